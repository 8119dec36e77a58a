"""Adapter folders as PEFT itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_adapter(folder: Path, base: str, *, seed: int = 0, scalar: bool = False, **config: Any) -> str:
    """A LoRA adapter on a model folder, of random weights that change its distributions."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto.from_pretrained(base, **({"num_labels": 1} if scalar else {}))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    task = "SEQ_CLS" if scalar else "CAUSAL_LM"
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(task_type=task, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(folder)
    return str(folder)
