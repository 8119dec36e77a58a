"""Load a causal language model from a folder, the Hub or the package itself, without dropout."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from aligndistil import recipe
from aligndistil.errors import MissingError, ServiceError, UserError

BUILTIN = "builtin:"
_DROPS = ("dropout", "pdrop", "dropout_prob", "layerdrop")
transformers.utils.logging.disable_progress_bar()  # it draws over ours
_T = TypeVar("_T")


def builtin_model(path: str) -> str:
    """`builtin:NAME` to the folder inside the package; any other path unchanged."""
    if not path.startswith(BUILTIN):
        return path
    assets = Path(str(files("aligndistil") / "assets"))
    folder = assets / path.removeprefix(BUILTIN)
    if not (folder / "config.json").is_file():
        known = sorted(f"{BUILTIN}{p.parent.name}" for p in assets.glob("*/config.json"))
        raise UserError(f"model {path!r} is not embedded in the package; there is {', '.join(known)}")
    return str(folder)


def model_exists(path: str) -> None:
    """Refuse a local folder that is not there or is no model folder. Names of Hub models are not looked up."""
    path = builtin_model(path)
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {path!r} has no config.json; give the folder that save_pretrained wrote")
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir()
    if looks_local:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, siblings, n=1)
        hint = f"did you mean {str(folder.parent / near[0])!r}?" if near else "give a folder, a Hub id or builtin:tiny"
        raise UserError(f"model {path!r} does not exist; {hint}")


def pick_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on a CPU, where bfloat16 is many times slower."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_model(path: str, section: recipe.Model, *, trained: bool) -> PreTrainedModel:
    """The causal language model of one role, with the loading options of the recipe's `model` section.

    Dropout is off: the reference and the policy must agree at step 0, and a resumed run must repeat itself.
    Raises UserError when the folder or Hub model cannot be loaded or lacks weights, MissingError when a package that
    loading it needs is not installed, ServiceError when the Hub cannot be reached.
    """
    options = _options(path, section)
    loaded: Any = from_hub(path, lambda: AutoModelForCausalLM.from_pretrained(builtin_model(path), **options))
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(
            f"model {path!r} lacks {len(missing)} of its weights, {missing[0]} for one, which transformers would draw "
            "at random; give a complete causal language model"
        )
    return _ready(model, section, trained=trained)


def load_scalar_model(path: str, section: recipe.Model, *, trained: bool, seed: int = 0) -> PreTrainedModel:
    """A sequence-classification model with one output, without dropout: a reward model or a critic.

    One that is trained may come from a language model: its head is then new, drawn by `seed`.
    Raises UserError when a frozen one has no head or a head has other outputs, and as `load_model` does.
    """
    options = _options(path, section)
    config = options["config"]
    if config.num_labels != 1 and any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"model {path!r} is a classifier with {config.num_labels} outputs, and a score is one number")
    config.num_labels = 1
    loaded: Any = from_hub(
        path, lambda: AutoModelForSequenceClassification.from_pretrained(builtin_model(path), **options)
    )
    model: PreTrainedModel = loaded[0]
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"model {path!r} ({type(model).__name__}) has no linear head called `score`; use an architecture that "
            "transformers gives one (Llama, Qwen2, Mistral, Gemma, GPT-2 ...)"
        )
    missing = sorted(key for key in loaded[1]["missing_keys"] if not key.startswith("score."))
    if missing or (loaded[1]["missing_keys"] and not trained):
        raise UserError(
            f"model {path!r} lacks {(missing or ['score.weight'])[0]}, which transformers would draw at random; give "
            "a model with a trained scalar head, such as a stage that trains one"
        )
    if loaded[1]["missing_keys"]:
        generator = torch.Generator().manual_seed(seed)
        spread = getattr(options["config"].get_text_config(), "initializer_range", 0.02)
        head.weight.data.copy_(spread * torch.randn(head.weight.shape, generator=generator))
    return _ready(model, section, trained=trained)


def _options(path: str, section: recipe.Model) -> dict[str, Any]:
    """How every model of a recipe is loaded; its configuration is without dropout."""
    model_exists(path)
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if path == section.path and section.revision:
        options["revision"] = section.revision
    config = from_hub(path, lambda: AutoConfig.from_pretrained(builtin_model(path), **options))
    for part in (config, config.get_text_config()):
        for key in part.to_dict():
            if key.endswith(_DROPS) and isinstance(getattr(part, key), float):
                setattr(part, key, 0.0)
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    return options | {"config": config, "dtype": pick_dtype(section.dtype), "output_loading_info": True}


def _ready(model: PreTrainedModel, section: recipe.Model, *, trained: bool) -> PreTrainedModel:
    model.config.use_cache = False
    if trained and section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def from_hub(path: str, load: Callable[[], _T]) -> _T:
    """Run a loading call of transformers and say in one sentence why it failed."""
    try:
        return load()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ImportError):
            raise MissingError(f"model {path!r} needs a package that is not installed: {first}") from None
        is_local = os.path.isdir(builtin_model(path))
        offline = "connect" in str(error).lower() or "offline" in str(error).lower()
        if offline and not is_local:
            raise ServiceError(
                f"model {path!r} is no local folder and the Hugging Face Hub cannot be reached; "
                f"give a folder, or check the network and HF_HUB_OFFLINE ({first})"
            ) from None
        version = transformers.__version__
        raise UserError(f"model {path!r} cannot be loaded by transformers {version}: {first}") from None


def model_hash(path: str) -> str:
    """SHA-256 of what is in a local model folder: small files whole, of weights the size and both ends.

    A Hub id stands for itself: its revision is part of the recipe.
    """
    folder = Path(builtin_model(path))
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    end = 2**20
    kinds = (".json", ".safetensors", ".bin", ".jinja", ".model")
    for file in sorted(p for p in folder.iterdir() if p.suffix in kinds):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(end))
            stream.seek(max(0, size - end))
            digest.update(stream.read(end))
    return digest.hexdigest()
