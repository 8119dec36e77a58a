"""One self-contained HTML page: the values as JSON in it, and the script that shows them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from aligndistil import __version__
from aligndistil.engine.policy import on_device
from aligndistil.files import write_text
from aligndistil.models import load_model, load_tokenizer, shared_vocab, stop_ids
from aligndistil.objectives.base import Role, TermInfo
from aligndistil.progress import Steps
from aligndistil.rollout import LoadedModel
from aligndistil.run_folder.outputs import check_file
from aligndistil.token_view.responses import Request, Response, answer, choose
from aligndistil.token_view.texts import TokenDecoder
from aligndistil.token_view.trained import TrainedStage, find_stage
from aligndistil.token_view.values import TARGET, TokenValues, Viewer

OWN_TERMS = {
    "log_ratio": TermInfo("log-ratio", "log-probability of the token under the policy less that under the reference"),
    "loss_share": TermInfo("share of loss", "part of the response's loss that this token makes up"),
}
"""What the page adds to the terms that an objective declares."""
_SCRIPTS = ("scales.js", "view.js", "charts.js")
_BATCH = 8
"""Prompts that are answered together."""


def inspect(path: Path, request: Request, out: Path | None = None, top: int = 6) -> Path:
    """Write the page of a stage, or of a run's last; return where: `out`, or `inspect.html` in the stage's folder.

    Raises UserError when there is no such stage, prompt or row, and when `out` cannot be written.
    """
    stage = find_stage(path)
    if out is not None:
        check_file(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(where: str) -> Any:
        return on_device(load_model(where, stage.model, trained=False), device).eval()

    tokenizer = load_tokenizer(stage.model.path, stage.model)
    stops = stop_ids(stage.model.path, stage.model, tokenizer)
    chosen = choose(stage, request, tokenizer, stops)
    models = {where: load(where) for where in {stage.model.path, *stage.paths.values()}}
    vocab = shared_vocab(models.values(), tokenizer)
    policy = LoadedModel(models[stage.model.path], tokenizer, stops, vocab, _BATCH)
    shown = answer(stage, chosen, request.max_new_tokens, policy)
    temperature = stage.objective.trained_at(stage.rollout.temperature) if stage.rollout else 1.0
    frozen = {role: models[p] for role, p in stage.paths.items()}
    viewer = Viewer(stage.objective, policy.model, frozen, vocab, top, temperature)
    viewed = []
    with Steps(f"looking at {stage.name}", len(shown), unit="responses") as steps:
        for response in shown:
            viewed.append((response, viewer.values(response.row)))
            steps.advance()
    return write_page(out or stage.folder / "inspect.html", page_data(stage, viewed, tokenizer, top))


def page_data(
    stage: TrainedStage, viewed: Sequence[tuple[Response, TokenValues]], tokenizer: PreTrainedTokenizerBase, top: int
) -> dict[str, Any]:
    """What the page shows, in JSON's types; numbers are rounded to six digits."""
    decoder = TokenDecoder(tokenizer)
    first = viewed[0][1]
    names = list(first.terms) + (["loss_share"] if any(values.loss for _, values in viewed) else [])
    infos = {**stage.objective.terms, **OWN_TERMS}
    # What a token was worth comes first, where it has a worth of its own.
    leading = [name for name in ("reward", "log_ratio") if name in names]
    ordered = list(dict.fromkeys([*leading, *(name for name in infos if name in names), *names]))
    used = sorted({token for _, values in viewed for row in values.candidates for token in row})
    return {
        "version": __version__,
        "stage": f"{stage.folder.resolve().parent.name}/{stage.name}",
        "objective": stage.objective.name,
        "paper": stage.objective.paper,
        "steps": stage.steps,
        "settings": _settings(stage),
        "top": top,
        "distributions": [_distribution(stage, name) for name in first.probabilities],
        "terms": [_term(name, infos) for name in ordered],
        "vocabulary": {token: decoder.alone(token) for token in used},
        "responses": [_response(response, values, decoder) for response, values in viewed],
    }


def _settings(stage: TrainedStage) -> list[list[Any]]:
    fields = stage.objective.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    return [[name, value] for name, value in fields.items() if isinstance(value, str | int | float)]


def _distribution(stage: TrainedStage, name: str) -> dict[str, str]:
    known = {Role.POLICY: "this stage", TARGET: "what it learns"}
    path = known.get(name) or stage.named[name]
    return {"key": name, "label": name.replace("_", " "), "path": path.removeprefix("stage:")}


def _term(name: str, infos: Mapping[str, TermInfo]) -> dict[str, str]:
    info = infos.get(name) or TermInfo(name.replace("_", " "), f"the objective's term {name}")
    return {"key": name, "label": info.label, "about": info.meaning}


def _response(response: Response, values: TokenValues, decoder: TokenDecoder) -> dict[str, Any]:
    prompt, ids = response.row.prompt_ids, response.row.response_ids
    texts = decoder.sequence([*prompt, *ids])
    return {
        "label": response.label,
        "finished": response.finished,
        "prompt": texts[: len(prompt)],
        "tokens": [[*text, token] for text, token in zip(texts[len(prompt) :], ids, strict=True)],
        "terms": _rounded(values.terms),
        "loss": None if values.loss is None else _rounded(values.loss),
        "candidates": values.candidates,
        "probabilities": {
            name: [[round(p, 6) for p in row] for row in rows] for name, rows in values.probabilities.items()
        },
        "ranks": values.ranks,
    }


def _rounded(value: Any) -> Any:
    """Six significant digits; what is not finite is null, for JSON has no word for it."""
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if math.isfinite(value) else None


def write_page(path: Path, data: Mapping[str, Any]) -> Path:
    """The page with `data` in it, written aside and renamed. Nothing in it is loaded from anywhere else."""
    folder = files("aligndistil.token_view")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        # `</script>` and `<!--` end or change the element that the data stands in; in JSON `<` only occurs in strings.
        "data": text.replace("<", "\\u003c"),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    # One pass, so that text of a model that looks like a placeholder stays text.
    write_text(path, re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], template))
    return path
