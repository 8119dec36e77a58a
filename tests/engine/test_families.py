"""Families that people use, built tiny: a padded batch in chunks has the numbers of the model's own log_softmax."""

import importlib.util
import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest

from aligndistil.engine.head import Head
from aligndistil.errors import UserError

ROOT = Path(__file__).parents[2]
FAMILIES = [
    "llama",
    "llama4_text",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phimoe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "opt",
    "olmo2",
    "granite",
    "cohere2",
    "falcon_h1",
    "recurrent_gemma",
    "mamba2",
    "rwkv",
    "deepseek_v3",
    "smollm3",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What makes docs/families.md."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts/families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_the_model_s_own(script: ModuleType, family: str) -> None:
    model = script.tiny(family)
    found = script.compared(model)
    assert found["logp"] < 2e-5, "nats a token"
    assert found["gradient"] < 2e-5, "of the largest"


def test_the_comparison_sees_a_wrong_head(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = script.tiny("falcon_h1")
    own = Head.of(model, script.VOCAB)
    monkeypatch.setattr(Head, "of", lambda *_: Head(own.linear, own.scale * 1.001, None, own.vocab))
    found = script.compared(model)
    assert found["logp"] > script.LIMITS["logp"]


@pytest.mark.parametrize("family", ["bert", "xlnet", "xlm", "cpmant", "dory"])
def test_what_is_not_causal_or_learns_its_factors_is_refused(script: ModuleType, family: str) -> None:
    """Dory's logits are multiplied by a learnt number for each token."""
    why = "logit_scale" if family == "dory" else "is not causal"
    with pytest.raises(UserError, match=why):
        script.compared(script.tiny(family))


def test_the_page_lists_every_family_and_calls_none_wrong() -> None:
    text = (ROOT / "docs/families.md").read_text()
    assert "**wrong**" not in text
    for family in set(FAMILIES) - {"rwkv"}:
        assert f"| {family} |" in text
        assert next(line for line in text.splitlines() if line.startswith(f"| {family} |")).endswith("| exact |")


def test_a_family_that_crashes_hangs_or_fails_is_a_line_of_its_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result_of(family: str) -> dict[str, object]:
        if family == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        if family == "hangs":
            time.sleep(60)
        return {"family": family, "class": "C", "logp": 1e-6, "gradient": 1e-6, "rollout": 1e-6}

    monkeypatch.setattr(script, "result_of", result_of)
    monkeypatch.setattr(script, "PAGE", tmp_path / "families.md")
    names = dict.fromkeys(["crashes", "hangs", "works"], "")
    monkeypatch.setattr(script, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", names)
    monkeypatch.setattr("sys.argv", ["families.py", "--results", str(tmp_path / "r.jsonl"), "--seconds", "2"])
    for _ in range(2):  # nothing is left to do the second time
        with pytest.raises(SystemExit, match="False"):
            script.main()
    assert capsys.readouterr().out.splitlines() == [
        "crashes: failed: the process ended with -9",
        "hangs: failed: took more than 2 seconds",
        "works: exact",
    ]
    page = (tmp_path / "families.md").read_text()
    assert "**Exact** are 1 " in page
    assert "2 could not be built" in page
    assert "| works | C | 1e-06 | 1e-06 | 1e-06 |  | exact |" in page
