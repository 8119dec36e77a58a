"""Judged benchmarks: AlpacaEval 2, MT-Bench, Arena-Hard, and win rates on prompts of one's own.

`base` says what a benchmark is, and each has its file; `files` fetches what belongs to them; `answers` asks a model and
`judges` who judges; `evaluate` does both for several models; `contamination` looks for questions in training data.
RewardBench 2 and the agreement with people (`reward_bench`, `human_agreement`) are about what ranks answers instead.
"""

from __future__ import annotations

from aligndistil.benchmarks.alpaca_eval import AlpacaEval
from aligndistil.benchmarks.arena_hard import ArenaHard
from aligndistil.benchmarks.base import Answer, Benchmark, JudgedAnswers, Question
from aligndistil.benchmarks.files import Files
from aligndistil.benchmarks.mt_bench import MTBench
from aligndistil.benchmarks.pairwise import Pairwise
from aligndistil.judge import JudgeConfig

BENCHMARKS: dict[str, type[Benchmark]] = {cls.name: cls for cls in (AlpacaEval, MTBench, ArenaHard, Pairwise)}

__all__ = [
    "BENCHMARKS",
    "AlpacaEval",
    "Answer",
    "ArenaHard",
    "Benchmark",
    "Files",
    "JudgedAnswers",
    "MTBench",
    "Pairwise",
    "Question",
    "benchmark_of",
]


def benchmark_of(name: str, files: Files, limit: int | None, judge: JudgeConfig | None) -> Benchmark:
    """The benchmark of that name, as far as its files alone make one."""
    if name == AlpacaEval.name and judge is not None:
        return AlpacaEval(files, limit, judge.alpaca_eval)
    return BENCHMARKS[name](files, limit)
