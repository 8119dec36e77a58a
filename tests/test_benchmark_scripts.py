"""The scripts in benchmarks/: what they count is what is computed, and they run with the package as it is."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aligndistil.engine.processes import Processes

FOLDER = Path(__file__).parents[1] / "benchmarks"
Script = Callable[[str], Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(name: str, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **settings)


def tiny(script: Script, **changed: Any) -> Any:
    sizes = {"rows": 4, "micro_rows": 2, "tokens": 16, "response_share": 0.75, "steps": 2}
    return script("shapes").Asked(**{"device": "cpu", "dtype": "float32", "shape": "tiny", **sizes, **changed})


def test_a_shape_has_the_weights_and_operations_of_its_model(script: Script) -> None:
    shapes = script("shapes")
    shape, rows, length = shapes.SHAPES["tiny"], 2, 16
    model = shapes.random_model(shape, 0, "cpu", torch.float32)
    assert shape.weights == sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    model.set_attn_implementation("eager")  # the counter overlooks the fused one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(rows, length, dtype=torch.long))
    whole = 4 * shape.layers * shape.hidden * length  # attention to all tokens, of which a causal model needs half
    head = 2 * shape.vocab * shape.hidden
    assert counter.get_total_flops() == rows * length * (2 * shape.body_weights + whole + head)
    # With ceilings of one operation a second and no limit elsewhere, the floor is the number of operations.
    asked = tiny(script, rows=rows, tokens=length)
    body = shapes.floor_seconds(asked, 0, shapes.Ceilings(1.0, math.inf, math.inf))
    assert body == 3 * rows * length * (2 * shape.body_weights + whole / 2)
    of_head = shapes.floor_seconds(asked, 2, shapes.Ceilings(math.inf, 1.0, math.inf))
    assert of_head == rows * asked.response * (3 + 2) * head


def test_the_shapes_are_those_of_qwen(script: Script) -> None:
    shapes = script("shapes").SHAPES
    assert shapes["qwen2.5-1.5b"].weights == pytest.approx(1.54e9, rel=0.01)
    assert shapes["qwen2.5-7b"].weights == pytest.approx(7.62e9, rel=0.01)


@pytest.mark.parametrize("name", ["aligndistil", "dpo"])
def test_the_sides_of_the_head_compute_the_same(name: str, script: Script) -> None:
    heads = script("heads")
    given = heads.make_inputs(
        heads.OBJECTIVES[name], rows=4, tokens=32, vocab=50, hidden=8, device="cpu", dtype=torch.float32
    )
    losses, gradients = [], []
    for side in (heads.ours, heads.plain):
        given.forget_gradients()
        losses.append(side(given))
        gradients.append((given.hidden.grad, given.weight.grad))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    with FlopCounterMode(display=False) as counter:
        heads.Products(given)(given)
    assert counter.get_total_flops() == heads.product_operations(given)


@pytest.mark.parametrize("name", ["dpo", "aligndistil"])
def test_a_step_on_random_weights_lowers_the_loss(name: str, script: Script, processes: Processes) -> None:
    found = script("gpu_parts").measure_ours(tiny(script), name)
    assert len(found["losses"]) == 4  # two of them to warm up
    assert found["losses"][-1] < found["losses"][0]
    if name == "dpo":
        assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found["seconds"] > 0


def test_a_table_is_replaced_between_its_markers(script: Script, monkeypatch: Any, tmp_path: Path) -> None:
    page, file = script("page"), tmp_path / "README.md"
    file.write_text("a\n<!-- one:begin -->\nold\n<!-- one:end -->\nb\n<!-- two:begin -->\nkept\n<!-- two:end -->\n")
    monkeypatch.setattr(page, "README", file)
    page.replace_table("one", page.markdown(("name", "ms"), [("x", "1")]))
    table = "| name | ms |\n|---|---:|\n| x | 1 |"
    rest = "b\n<!-- two:begin -->\nkept\n<!-- two:end -->\n"
    assert file.read_text() == f"a\n<!-- one:begin -->\n{table}\n<!-- one:end -->\n{rest}"


def test_every_table_has_its_place_in_the_readme(script: Script) -> None:
    text = script("page").README.read_text()
    for name in ("token_terms", "gpu", "parity", "data"):
        assert text.count(f"<!-- {name}:begin -->") == text.count(f"<!-- {name}:end -->") == 1


@pytest.mark.slow
def test_the_benchmark_of_a_card_goes_the_same_way_on_a_cpu(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = run("gpu.py", "--device", "cpu", "--shape", "tiny", "--quick", "--json", found)
    assert done.returncode == 0, done.stderr
    parts = json.loads(found.read_text())["tiny"]
    for part in ("ours dpo", "ours aligndistil"):
        assert parts[part]["seconds"] > 0
    assert parts["head"]["ceilings"]["body"] > 1e9
    if "missing" not in (theirs := parts["trl float32"]):
        assert theirs["losses"] == pytest.approx(parts["ours dpo"]["losses"], abs=1e-4)


@pytest.mark.slow
def test_off_policy_aligndistil_trains_like_plain_pytorch() -> None:
    done = run("parity_trl.py", "--objective", "aligndistil", "--steps", "3", "--threads", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within the tolerance of 1e-04" in done.stdout
