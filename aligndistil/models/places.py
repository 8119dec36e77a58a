"""Where a model lies: a folder, `builtin:NAME`, or `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hub."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from aligndistil.errors import MissingError, ServiceError, UserError, nearest, of_the_system, out_of_memory

BUILTIN = "builtin:"
ADAPTER = "adapter_config.json"
"""By which the folder of an adapter is known."""
_OF_BASE = ("base_model_name_or_path", "revision")
_OF_A_MODEL = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".py")
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


def located(path: str) -> tuple[str, dict[str, Any]]:
    """A folder or Hub id, and the options of `from_pretrained` that say which revision of it."""
    place = builtin_model(path)
    name, at, revision = place.rpartition("@")
    if not at or Path(place).exists():
        return place, {}
    return name, {"revision": revision}


def base_of(path: str) -> str | None:
    """The path of the model that the adapter in a local folder was trained on; None where there is no adapter.

    Raises UserError when its configuration is damaged, or names no base.
    """
    config = _adapter_config(path)
    if config is None:
        return None
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"adapter {path!r} names no base: write base_model_name_or_path into its {ADAPTER}")
    return base if revision is None or os.path.isdir(base) or base.startswith(BUILTIN) else f"{base}@{revision}"


def whole_base_of(path: str) -> str:
    """The whole model that an adapter was trained on, through others if need be; any other path unchanged."""
    base = base_of(path)
    return path if base is None else whole_base_of(base)


def configured(path: str) -> str:
    """Where the configuration of a model lies: that of an adapter is its base's, unless it brings one of its own."""
    base = base_of(path)
    return path if base is None or (Path(path) / "config.json").is_file() else configured(base)


def _adapter_config(path: str) -> dict[str, Any] | None:
    file = Path(path) / ADAPTER
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"adapter {path!r} cannot be loaded: its {ADAPTER} holds no JSON object")
    return config


def model_exists(path: str) -> None:
    """Refuse a local folder that is not there or is no model folder. Names of Hub models are not looked up."""
    place, revision = located(path)
    folder = Path(place)
    if folder.is_dir():
        if revision:
            raise UserError(f"model {path!r} is a local folder, which has no revisions; give {place!r}")
        if (base := base_of(path)) is not None:
            try:
                model_exists(base)
            except UserError as error:
                raise UserError(f"adapter {path!r} has lost its base, which its {ADAPTER} names: {error}") from None
            return
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {place!r} has no config.json; give the folder that save_pretrained wrote")
        return
    looks_local = place.startswith((".", "/", "~")) or place.count("/") != 1 or folder.parent.is_dir()
    if looks_local:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, siblings)
        hint = f"did you mean {str(folder.parent / near[0])!r}?" if near else "give a folder, a Hub id or builtin:tiny"
        raise UserError(f"model {path!r} does not exist; {hint}")


def from_hub(path: str, load: Callable[[], _T]) -> _T:
    """Run a loading call of transformers and say in one sentence why it failed.

    Whatever it raises is about somebody's files: transformers looks at few of the values in them before it uses them.
    What this machine has not enough of is raised as it is.
    """
    try:
        return load()
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error) or of_the_system(error):
            raise
        first = _wrong_file(Path(builtin_model(path))) or _first_line(error)
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


def _wrong_file(folder: Path) -> str:
    """Which file of a local model is not what it should be, or nothing: what transformers says of it may be no help."""
    for file in sorted(folder.glob("*.json")):
        try:
            whole = isinstance(json.loads(file.read_bytes()), dict)
        except (OSError, ValueError, RecursionError):
            whole = False
        if not whole:
            return f"its {file.name} holds no JSON object"
    if any(folder.glob("*.safetensors")):
        return ""
    for file in sorted(folder.glob("*.bin")):
        try:
            whole = isinstance(torch.load(file, map_location="meta", weights_only=True), dict)
        except Exception:  # what a file that is no weights makes of the reader
            whole = False
        if not whole:
            return f"its {file.name} holds no weights, or more than tensors, which could run code; give safetensors"
    return ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines[0] = " ".join(lines[:2])
    # An error of another kind says little without its name: KeyError('x'), TypeError(...).
    plain = isinstance(error, OSError | ValueError | ImportError | SafetensorError)
    name = "" if plain and lines else type(error).__name__
    return ": ".join(part for part in (name, lines[0] if lines else "") if part)


def model_hash(path: str) -> str:
    """SHA-256 of the files of a local model folder; of a Hub model the commit that its revision is at now.

    That of an adapter depends on what its base is, and not on where that lies.
    Raises what `from_hub` raises where the Hub is needed and does not answer.
    """
    place, revision = located(path)
    folder = Path(place)
    if not folder.is_dir():
        # The snapshot that holds a file is called after its commit, online and in the cache.
        config = from_hub(path, lambda: hf_hub_download(place, "config.json", **revision))
        return f"{place}@{Path(config).parent.name}"
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in _OF_A_MODEL and p.is_file()):
        if file.name == ADAPTER and (base := base_of(path)) is not None:
            config = {key: value for key, value in (_adapter_config(path) or {}).items() if key not in _OF_BASE}
            digest.update(f"{json.dumps(config, sort_keys=True)} {model_hash(base)} ".encode())
            continue
        stat = file.stat()
        digest.update(f"{file.name} {_file_hash(file, stat.st_size, stat.st_mtime_ns)} ".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(file: Path, size: int, modified: int) -> str:
    """Read once a process: weights are hashed for the fingerprint, the caches and the comparison."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
