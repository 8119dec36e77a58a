"""Small worlds: models of 30,000 random weights, a tokenizer of 96 words, pairs of nonsense, and real processes."""

import inspect
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# Before anything reads them: no test touches the network or what a person has cached.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="aligndistil-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

PAD, EOS = 0, 1
SPECIALS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>"]
WORDS = [f"w{number:02d}" for number in range(91)]
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} <bot>"
    "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
)


def build_tokenizer(words: list[str] = WORDS) -> Any:
    """A word is a token; token 1 ends a response."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": CHAT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIALS[3:], **names)


def build_model(*, seed: int = 0, tied: bool = True, vocab: int = 96, **config: Any) -> Any:
    """A Llama of 2 layers x 32 whose distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    settings = {"max_position_embeddings": 128, "initializer_range": 0.3, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **{**sizes, **ends, **settings, **config})).eval()


ModelFolder = Callable[..., str]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Saves a model of `build_model` with its tokenizer; the same arguments give the same folder."""
    known: dict[str, str] = {}

    def folder(**settings: Any) -> str:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            path = tmp_path_factory.mktemp("model")
            build_model(**settings).save_pretrained(path)
            build_tokenizer().save_pretrained(path)
            known[key] = str(path)
        return known[key]

    return folder


def nonsense(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(shortest, longest)))


@pytest.fixture
def pairs_file(tmp_path: Path) -> Callable[..., str]:
    """Writes n preference pairs of ragged lengths to a .jsonl file."""

    def write(n: int, *, seed: int = 0, name: str = "pairs.jsonl") -> str:
        draw = random.Random(seed)
        rows = [
            {"prompt": nonsense(draw, 1, 6), "chosen": nonsense(draw, 1, 9), "rejected": nonsense(draw, 1, 9)}
            for _ in range(n)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """Writes a recipe, and makes its folder the current one."""
    monkeypatch.chdir(tmp_path)

    def write(content: dict[str, Any], name: str = "toy.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def processes() -> Iterator[Any]:
    """This process as a group of one."""
    from aligndistil.engine.processes import start_processes

    started = start_processes()
    yield started
    started.stop()


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


CALL = """
import importlib, json, sys
folder, module, name, arguments, result = sys.argv[1:]
sys.path[:0] = [folder, {tests!r}]
answer = getattr(importlib.import_module(module), name)(*json.loads(arguments))
open(result, "w").write(json.dumps(answer))
"""


@pytest.fixture
def on_processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """Calls a top-level function of a test module on several processes; its answers (JSON) in order of rank.

    Fails when one of them fails, or when they are not done in time.
    """

    def call(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 120) -> list[Any]:
        file, port = Path(inspect.getfile(function)), free_port()
        results = [tmp_path / f"{function.__name__}-{rank}.json" for rank in range(world)]
        code = CALL.format(tests=str(Path(__file__).parent))
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(file.parent), file.stem, function.__name__, json.dumps(arguments), r],
                env=environment(rank, world, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, r in enumerate(map(str, results))
        ]
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        for process, output in zip(started, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]
        return [json.loads(path.read_text()) for path in results]

    return call
