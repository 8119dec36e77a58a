"""How long a text a model can read, as its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from aligndistil.models import Positions, positions
from aligndistil.recipe import Model

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96}


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("gpt2", {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2}, Positions(48, fixed=True)),
        ("opt", {"max_position_embeddings": 48, "ffn_dim": 64, "word_embed_proj_dim": 32}, Positions(48, fixed=True)),
        (
            "gpt_neo",
            {"max_position_embeddings": 48, "attention_types": [[["global"], 1]]},
            Positions(48, fixed=True),
        ),
        (
            "gptj",
            {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8},
            Positions(48, fixed=True),
        ),
        ("llama", {"max_position_embeddings": 48}, Positions(48, fixed=False)),
        ("qwen2", {"max_position_embeddings": 48, "num_key_value_heads": 2}, Positions(48, fixed=False)),
        ("gpt_neox", {"max_position_embeddings": 48}, Positions(48, fixed=False)),
        ("nemotron_h", {"max_position_embeddings": 48, "mamba_num_heads": 4, "mamba_head_dim": 16}, None),
        ("bloom", {"n_layer": 1, "n_head": 2}, None),
        ("mamba", {}, None),
    ],
)
def test_a_table_of_positions_has_an_end_and_rotations_have_been_seen_to_one(
    tmp_path: Path, kind: str, fields: dict[str, Any], expected: Positions | None
) -> None:
    AutoConfig.for_model(kind, **{**SMALL, **fields}).save_pretrained(tmp_path)
    assert positions(str(tmp_path), Model(path=str(tmp_path))) == expected
