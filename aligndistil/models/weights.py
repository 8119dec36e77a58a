"""The tensors of a model as they lie on the disk, by the names they have there."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from aligndistil.models.places import from_hub, located

_NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Of the file of weights, or of its index: the first that is there is what transformers loads."""


_RAISES = (
    "_raise_exceptions_for_gated_repo",
    "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)


def published_file(path: str, name: str) -> Path | None:
    """A file of a model folder or Hub model; None where it has no such file, or the Hub does not answer."""
    place, options = located(path)
    options |= dict.fromkeys(_RAISES, False)
    found = cached_file(place, name, **options)
    return None if found is None else Path(found)


def published_tensors(path: str, *, contents: bool = True) -> dict[str, Tensor]:
    """The tensors of a model folder or Hub model, mapped and not read yet; on `meta` where no `contents` are wanted.

    Empty where there is no file of weights. Raises UserError or ServiceError as `from_hub`.
    """
    place, revision = located(path)
    first = next((file for name in _NAMES if (file := published_file(path, name)) is not None), None)
    if first is None:
        return {}

    def read() -> dict[str, Tensor]:
        index = first.name.endswith(".json")
        files = get_checkpoint_shard_files(place, str(first), **revision)[0] if index else [first]
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= load_state_dict(file, map_location="cpu" if contents else "meta")
        return tensors

    return from_hub(path, read)
