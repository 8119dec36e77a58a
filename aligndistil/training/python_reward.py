"""A reward that is a function of the user's: `python:MODULE:FUNCTION`, which `--allow-code` permits."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Batch
from aligndistil.errors import UserError
from aligndistil.recipe import CODE
from aligndistil.training.text_reward import at_last_token, ids_of


class PythonReward:
    """Scores responses with a function, at the last token of each.

    The function is called with keyword arguments, each a list with one entry a response: `prompts` and `responses`
    (texts; the response without special tokens), `prompt_ids` and `response_ids` (token ids). It returns one finite
    number for each.
    """

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.function = load_function(path)

    def scores(self, batch: Batch) -> Tensor:
        """(B, T) float32, zero but at the last response token. Raises UserError when what comes back is no score."""
        prompt_ids, response_ids = ids_of(batch)
        values = self.function(
            prompts=self.tokenizer.batch_decode(prompt_ids),
            responses=self.tokenizer.batch_decode(response_ids, skip_special_tokens=True),
            prompt_ids=prompt_ids,
            response_ids=response_ids,
        )
        return at_last_token(batch, torch.tensor(self._checked(values, batch.rows), device=batch.ids_BT.device))

    def _checked(self, values: Any, rows: int) -> list[float]:
        try:
            scores = [float(value) for value in values]
        except (TypeError, ValueError):
            raise UserError(f"models.reward: {self.path} must return a list of numbers, not {values!r:.80}") from None
        if len(scores) != rows or not all(map(math.isfinite, scores)):
            raise UserError(
                f"models.reward: {self.path} was given {rows} responses and returned {len(scores)} numbers, "
                f"{sum(map(math.isfinite, scores))} of them finite; it must return one finite number for each"
            )
        return scores


def load_function(path: str) -> Callable[..., Any]:
    """Import MODULE, from the current folder too, and take FUNCTION. Raises UserError when there is no such thing."""
    _, module_name, name = path.split(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"there is no module {error.name!r} for {path}; start in the folder that holds it, or install it"
        ) from None
    except Exception as error:  # whatever the user's module raises is the user's to mend
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = error.lineno if isinstance(error, SyntaxError) else where.lineno
        file = error.filename if isinstance(error, SyntaxError) else where.filename
        raise UserError(f"module {module_name!r} of {path} cannot be imported: {file}:{line}: {error!r}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None or not callable(function):
        raise UserError(f"module {module_name!r} has no function {name!r}, which {path} names")
    return function


def source_of(path: str) -> str:
    """The text of MODULE, and of the module that FUNCTION comes from, which a stage's result depends on."""
    named = [path.split(":")[1], load_function(path).__module__]
    modules = [sys.modules.get(name) for name in dict.fromkeys(named)]
    files = [getattr(module, "__file__", None) for module in modules]
    sources = [Path(file) for file in files if file is not None and file.endswith(".py")]
    if not sources:
        raise UserError(f"{path} is no Python function of a .py file; write one that calls it")
    return "".join(file.read_text(encoding="utf-8") for file in sources)


def is_code(path: str) -> bool:
    """Whether a model path names a function."""
    return path.startswith(CODE)
