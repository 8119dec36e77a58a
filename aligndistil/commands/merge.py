"""`aligndistil merge`: an adapter and its base as one whole model."""

from __future__ import annotations

from pathlib import Path

from aligndistil.errors import UserError
from aligndistil.models import (
    adapter_at,
    config_of,
    export_model,
    load_model,
    load_scalar_model,
    load_tokenizer,
    model_exists,
    model_hash,
    stop_ids,
)
from aligndistil.run_folder import check_as_trained, section_of


def merge(path: str, out: Path) -> Path:
    """Write the whole model of an adapter folder, in the dtypes and with the names of its base; returns its folder.

    The sums are taken in float32. Raises UserError when there is no adapter, its base is gone, or `out` is there.
    """
    if out.exists():
        raise UserError(f"--out {out} is there already; give a folder that is not")
    model_exists(path)
    adapter = adapter_at(path)
    if adapter is None:
        raise UserError(
            f"{path} is no adapter folder: it has no adapter_config.json, and a whole model needs no merging"
        )
    check_as_trained(path, model_hash)
    section = section_of(path).model_copy(update={"dtype": "float32"})
    architectures = config_of(path, section).architectures or []
    scores = adapter.config.task_type == "SEQ_CLS" or any("SequenceClassification" in name for name in architectures)
    model = (load_scalar_model if scores else load_model)(path, section, trained=False)
    stops = stop_ids(path, section, load_tokenizer(path, section))
    card = (
        f"# {out.name}\n\nThe LoRA adapter `{Path(path).name}` merged into its base `{adapter.base}` by aligndistil.\n"
    )
    export_model(model, model.state_dict(), path, section, stops, out, card)
    return out
