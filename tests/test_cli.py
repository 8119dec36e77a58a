"""Every command and every exit code, as a user meets them: through `main`, or as a process where that is the point."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from aligndistil import __version__
from aligndistil.cli import main

RECIPE = """\
name: small
model: {path: builtin:tiny}
data:
  train: {path: builtin:reviews, split: train, limit: 16}
  eval: {path: builtin:reviews, split: test, limit: 4}
  max_prompt_length: 64
  max_response_length: 64
train: {learning_rate: 1.0e-4, batch_size: 4, micro_batch_size: 4, max_steps: 2}
engine: {zero_stage: 0}
report: {samples: 4, max_new_tokens: 8}
stages:
  dpo:
    objective: {name: dpo}
    models: {reference: builtin:tiny}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line in this process; gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aligndistil", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def process(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "aligndistil", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} never appeared")


# ---- commands


def test_help_answers_without_importing_torch():
    code = "import sys; sys.argv = ['aligndistil', '--help']\nfrom aligndistil.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules, 'pydantic' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" in answer.stdout
    assert answer.stdout.strip().endswith("False False")


def test_version_is_the_packages(run):
    assert run("--version") == (0, f"{__version__}\n", "")


def test_validate_names_every_stage_and_what_it_is_compared_with(run, recipe):
    code, out, _ = run("validate", recipe)
    assert code == 0
    assert "dpo: dpo (off-policy) from builtin:tiny against reference builtin:tiny" in " ".join(out.split())


def test_validate_with_rows_shows_prompt_and_response_tokens(run, recipe):
    code, out, _ = run("validate", recipe, "--rows", "1")
    assert code == 0
    assert "16 rows read, 16 examples used" in out
    assert out.count("‖") == 2  # one boundary for the chosen and one for the rejected response


def test_dry_run_says_steps_and_memory_and_trains_nothing(run, recipe, tmp_path):
    code, out, _ = run("train", recipe, "--dry-run")
    assert code == 0
    assert re.search(r"dpo +to train .* 2 ", out)
    assert "GiB" in out
    assert not (tmp_path / "runs").exists()


def test_train_then_train_again_skips(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("aligndistil.training.memory.COARSE", 0.0)
    code, out, err = run("train", recipe)
    assert code == 0, err
    assert "runs/small/dpo/final" in out.replace("\n", "")
    assert (tmp_path / "runs/small/report/comparison.md").is_file()
    stage = tmp_path / "runs/small/dpo"
    first = json.loads((stage / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["perf/estimated_memory_gib"] < first["perf/peak_memory_gib"]  # which also holds Python
    assert (stage / "logs/rank-0.log").read_text().count("estimated were") == 1
    code, out, _ = run("train", recipe)
    assert code == 0
    assert "finished and unchanged" in out
    code, out, _ = run("train", recipe, "--dry-run")
    assert "finished and unchanged, skipped (2 steps" in " ".join(out.split())
    changed = ["--set", "train.learning_rate=2.0e-4"]
    code, out, _ = run("train", recipe, "--dry-run", *changed)
    assert "trained again because train.learning_rate changed from 0.0001 to 0.0002" in " ".join(out.split())
    (tmp_path / "runs/small/dpo/started.json").write_text("{")  # of no interest once a stage is done
    code, out, _ = run("train", recipe, *changed)
    assert code == 0
    assert "train.learning_rate changed from 0.0001 to 0.0002" in " ".join(out.split())


def test_train_one_stage_and_only_what_it_needs(run, recipe, tmp_path):
    recipe.write_text(
        RECIPE
        + "  reverse: {objective: {name: dpo}, models: {reference: builtin:tiny}, data: {reverse_preferences: true}}"
    )
    code, _, err = run("train", recipe, "--stage", "reverse")
    assert code == 0, err
    assert (tmp_path / "runs/small/reverse/final").is_dir()
    assert not (tmp_path / "runs/small/dpo").exists()


def test_objectives_as_table_and_as_json(run):
    code, out, _ = run("objectives")
    assert code == 0
    assert "aligndistil" in out
    code, out, _ = run("objectives", "--json")
    described = {one["name"]: one for one in json.loads(out)}
    assert code == 0
    assert described["dpo"]["models"] == {"policy": "logp", "reference": "logp"}
    assert described["dpo"]["fields"]["beta"]["default"] == 0.1


def test_schema_is_the_one_that_recipes_name(run):
    code, out, _ = run("schema")
    shipped = Path(__file__).parents[1] / "recipes" / "schema.json"
    assert code == 0
    assert json.loads(out) == json.loads(shipped.read_text()), "run `make schema`"


def test_generate_answers_each_prompt_the_same_way_for_the_same_seed(run):
    arguments = ("generate", "builtin:tiny", "--prompt", "Review The Silent Harbor.", "--max-new-tokens", "12")
    code, first, _ = run(*arguments, "--samples", "2")
    assert code == 0
    assert first.count("Review The Silent Harbor.") == 2
    assert run(*arguments, "--samples", "2")[1] == first
    assert run(*arguments, "--samples", "2", "--seed", "1")[1] != first


def test_env_prints_versions(run):
    code, out, _ = run("env")
    assert code == 0
    assert json.loads(out)["packages"]["aligndistil"] is not None


def test_recipes_ls_names_all_and_cp_copies_what_is_extended_too(run, tmp_path):
    code, out, _ = run("recipes", "ls")
    assert code == 0
    assert "quickstart" in out
    code, out, _ = run("recipes", "cp", "smollm2/cpu", tmp_path)
    assert code == 0
    assert (tmp_path / "smollm2/cpu.yaml").is_file()
    assert (tmp_path / "smollm2/ultrafeedback.yaml").is_file()
    assert (tmp_path / "schema.json").is_file()
    code, _, err = run("recipes", "cp", "smollm2/cpu", tmp_path)
    assert code == 2
    assert "exists already" in err


# ---- exit codes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "no.yaml"], "there is no recipe 'no.yaml'"),
        (["train", "smal.yaml"], "did you mean 'small.yaml'"),
        (["train", "small.yaml", "--set", "train.learning_rat=1"], "did you mean `learning_rate`"),
        (["train", "small.yaml", "--stage", "ppo"], "--stage ppo: the recipe has no such stage; it has dpo"),
        (["train", "small.yaml", "--processes", "0"], "--processes 0"),
        (["train", "small.yaml", "--processes", "3", "--dry-run"], "not a multiple of micro_batch_size x processes"),
        (["train", "small.yaml", "--set", "model.path=./nowhere"], "does not exist"),
        (["train", "small.yaml", "--set", "model.path=builtin:huge"], "is not embedded"),
        (["validate", "small.yaml", "--rows", "1", "--set", "data.train.path=no.jsonl"], "there is no such file"),
        (["recipes", "cp", "quickstrat"], "did you mean 'quickstart'"),
        (["generate", "builtin:huge", "--prompt", "x"], "is not embedded"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(run, recipe, arguments, sentence):
    code, _, err = run(*arguments)
    assert code == 2
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err


def test_a_wrong_option_is_exit_code_2(run, recipe):
    assert run("train", recipe, "--epochs", "3")[0] == 2


def test_too_many_unusable_rows_are_refused_with_reasons_and_leave_nothing(run, recipe, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    code, _, err = run("train", recipe, "--set", "data.train.path=pairs.jsonl.gz", "--set", "train.batch_size=4")
    assert code == 2
    assert "chosen and rejected are the same" in " ".join(err.split())
    assert not list(tmp_path.glob("runs/small/dpo/checkpoint-*"))
    assert not (tmp_path / "runs/small/dpo/final").exists()


def test_a_missing_extra_is_exit_code_3(run, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = run("train", recipe, "--set", "logging.trackers=[tensorboard]")
    assert code == 3
    assert "pip install" in " ".join(err.split())


def test_a_hub_that_cannot_be_reached_is_exit_code_4(recipe, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    running = process("train", recipe, "--set", "model.path=nobody/nothing-at-all", cwd=tmp_path, **offline)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 4, err
    assert "cannot be reached" in " ".join(err.split())
    assert "Traceback" not in err


def test_divergence_is_exit_code_5_and_exports_nothing(run, recipe, tmp_path):
    code, _, err = run("train", recipe, "--set", "train.learning_rate=1.0e+30", "--set", "train.max_steps=8")
    assert code == 5
    assert "lower train.learning_rate" in " ".join(err.split())
    assert not (tmp_path / "runs/small/dpo/final").exists()


def test_a_bug_is_exit_code_1_and_keeps_its_traceback(recipe, tmp_path):
    plugin = tmp_path / "plugin"
    (plugin / "broken-1.0.dist-info").mkdir(parents=True)
    (plugin / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (plugin / "broken-1.0.dist-info" / "entry_points.txt").write_text(
        "[aligndistil.objectives]\nbroken = broken:Broken\n"
    )
    (plugin / "broken.py").write_text(
        textwrap.dedent("""
            from typing import Literal
            from aligndistil.objectives.sft import SFT

            class Broken(SFT):
                name: Literal["broken"] = "broken"
                def loss(self, batch, terms):
                    return 1 / 0
        """)
    )
    path = os.pathsep.join([str(plugin), *sys.path])
    arguments = ("--set", "stages.dpo.objective={name: broken}", "--set", "stages.dpo.models=null")
    running = process("train", recipe, *arguments, cwd=tmp_path, PYTHONPATH=path)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_have_their_exit_codes_and_sigterm_leaves_a_checkpoint_to_continue_from(recipe, tmp_path, number, code):
    arguments = ("train", recipe, "--set", "train.max_steps=2000", "--set", "data.eval=null")
    running = process(*arguments, cwd=tmp_path)
    wait_for(tmp_path / "runs/small/dpo/metrics.jsonl", running)
    running.send_signal(number)
    _, err = running.communicate(timeout=120)
    assert running.returncode == code, err
    assert "Traceback" not in err
    if number == signal.SIGTERM:
        assert "run the same command to go on" in " ".join(err.split())
        assert list((tmp_path / "runs/small/dpo").glob("checkpoint-*"))


def test_several_processes_return_the_code_and_the_sentence_of_the_first_that_failed(recipe, tmp_path):
    arguments = ("--processes", "2", "--set", "train.micro_batch_size=2", "--set", "train.learning_rate=1.0e+30")
    running = process("train", recipe, *arguments, "--set", "train.max_steps=8", cwd=tmp_path)
    _, err = running.communicate(timeout=240)
    assert running.returncode == 5, err
    assert err.count("lower train.learning_rate") == 1


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_works(run, recipe, tmp_path):
    running = process("train", recipe, "--set", "train.max_steps=2000", "--set", "data.eval=null", cwd=tmp_path)
    wait_for(tmp_path / "runs/small/dpo/metrics.jsonl", running)
    before = (tmp_path / "runs/small/recipe.yaml").read_text()
    code, _, err = run("train", recipe, "--set", "train.learning_rate=0.5")
    assert (tmp_path / "runs/small/recipe.yaml").read_text() == before
    running.kill()
    running.communicate()
    assert code == 2
    assert "another process is working in runs/small" in " ".join(err.split())


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(command_line, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(
        "objective: {name: sft}\nmodel: {path: builtin:tiny}\ndata: {train: {path: ~/no}}\n"
    )
    code, _, told = command_line("validate", "~/mine.yaml")
    assert (code, f"{tmp_path}/no: there is no such file" in told) == (2, True)
    code, _, told = command_line("validate", "~/mine.yaml", "--set", "data.train.path=~/other")
    assert (code, f"{tmp_path}/other: there is no such file" in told) == (2, True)
    assert command_line("plot", "--out=~/x.png", "~/gone")[2].count(str(tmp_path)) == 1
    code, told, _ = command_line("generate", "builtin:tiny", "-p", "~/no file", "--max-new-tokens", 1)
    assert (code, "~/no file" in told) == (0, True)
