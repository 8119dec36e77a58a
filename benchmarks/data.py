"""How fast rows become tokens, and in how much memory: 10,000 to 1,000,000 preference pairs of a JSON Lines file.

    python benchmarks/data.py [--rows 10000 100000 1000000] [--workers 1 2] [--model FOLDER_OR_HUB_ID] [--write]

Each side is a process of its own with an empty cache folder, and reads the same file. `datasets` is the plain way:
`load_dataset`, and `map` of a function that renders and tokenises every pair; it checks nothing. Time is a ratio to
ours in one process. Memory is the highest sum over all processes of a side of what is their own (`RssAnon`), above what
the modules take; pages of mapped files, which the system takes back when it needs them, are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import replace_table

OURS, CACHED, PLAIN = "ours", "ours, from the cache", "`datasets`"


def main() -> None:
    asked = arguments()
    if asked.side:
        print(json.dumps(run_side(asked)))
        return
    lines = ["| rows | side | processes | seconds | rows/s | time | peak MiB |", "|---:|---|---:|---:|---:|---:|---:|"]
    for rows in asked.rows:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(asked, rows, Path(folder)):
                print(line, flush=True)
                lines.append(line)
    about = f"{os.cpu_count()} cores, Python {platform.python_version()}, the tokenizer of `{asked.model}`."
    if asked.write:
        replace_table("data", "\n".join([about, "", *lines]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--write", action="store_true", help="replace the table in benchmarks/README.md")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(asked: argparse.Namespace, rows: int, folder: Path) -> Iterator[str]:
    """A line of the table for each side. They must agree on the tokens of the first chosen response."""
    file, most, first = folder / "pairs.jsonl", asked.workers[-1], None
    write_pairs(file, rows)
    for side, workers in [
        *((OURS, count) for count in asked.workers),
        (CACHED, most),
        *((PLAIN, count) for count in asked.workers),
    ]:
        home = folder / f"{'datasets' if side == PLAIN else 'ours'}-{workers}"
        command = [sys.executable, __file__, "--side", side, "--file", str(file), "--model", asked.model]
        command += ["--workers", str(workers)]
        done = subprocess.run(command, env={**os.environ, "HF_HOME": str(home)}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        if found["first"][: len(first["first"])] != first["first"]:
            sys.exit(f"{side}: the first row has other tokens than ours: {found['first']}, not {first['first']}")
        yield (
            f"| {rows:,} | {side} | {workers} | {found['seconds']:.1f} | {rows / found['seconds']:,.0f} | "
            f"{found['seconds'] / first['seconds']:.2f} | {found['peak'] / 2**20:.0f} |"
        )


def write_pairs(path: Path, rows: int) -> None:
    words = ["river", "hill", "stone", "north", "seven", "market", "window", "early", "quiet", "bridge", "harbour"]
    drawn = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            asked, chosen, rejected = (" ".join(drawn.choices(words, k=count)) for count in (8, 12, 12))
            row = {"prompt": f"{number}: {asked}?", "chosen": f"{chosen}.", "rejected": f"{rejected}."}
            file.write(json.dumps(row) + "\n")


def run_side(asked: argparse.Namespace) -> dict[str, Any]:
    """What a side took; modules and tokenizer are there before it begins."""
    from aligndistil.batch import DataKind
    from aligndistil.data import load_examples
    from aligndistil.models import load_tokenizer, stop_ids
    from aligndistil.recipe import Data, Model

    section = Model(path=asked.model)
    tokenizer = load_tokenizer(asked.model, section)
    stops = stop_ids(asked.model, section, tokenizer)

    def ours(workers: int) -> list[int]:
        data = Data.model_validate({"train": {"path": asked.file}, "workers": workers})
        chosen, _ = load_examples(data, "train", DataKind.PAIRS, tokenizer, stops).rows(0)
        return [*chosen.prompt_ids, *chosen.response_ids]

    def plain(workers: int) -> list[int]:
        from datasets import load_dataset

        def tokenise(rows: dict[str, list[str]]) -> dict[str, Any]:
            turns = [[{"role": "user", "content": prompt}] for prompt in rows["prompt"]]
            texts = {
                "prompt_ids": [
                    tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns
                ]
            }
            for side in ("chosen", "rejected"):
                answers = [{"role": "assistant", "content": answer} for answer in rows[side]]
                wholes = [[*turn, answer] for turn, answer in zip(turns, answers, strict=True)]
                texts[f"{side}_ids"] = [tokenizer.apply_chat_template(whole, tokenize=False) for whole in wholes]
            return {name: tokenizer(of_name, add_special_tokens=False)["input_ids"] for name, of_name in texts.items()}

        rows = load_dataset("json", data_files=asked.file, split="train")
        num_proc = workers if workers > 1 else None
        made = rows.map(tokenise, batched=True, remove_columns=rows.column_names, num_proc=num_proc)
        return list(made[0]["chosen_ids"])

    side = plain if asked.side == PLAIN else ours
    with Memory() as memory:
        began = time.perf_counter()
        first = side(asked.workers[0])
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": memory.peak, "first": first}


class Memory:
    """The highest sum of RssAnon, in bytes, of this process and all below it, above what it was at the beginning."""

    def __enter__(self) -> Memory:
        self.peak, self._start, self._done = 0, own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, own_memory() - self._start)


def own_memory() -> int:
    waiting, found = [os.getpid()], 0
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
        found += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return found


if __name__ == "__main__":
    main()
