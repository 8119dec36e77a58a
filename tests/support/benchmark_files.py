"""The benchmarks' own files, which are not part of the repository, what stands in for one, and verdicts on them."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

STORE = Path(__file__).parents[3] / "shared" / "data"
"""They lie beside the repository, where somebody has put them there."""
ARENA_JUDGE = {
    "system_prompt": "Which answer is better? End with a label.",
    "prompt_template": ["Asked: {question_1}\nA says: {answer_1}\nB says: {answer_2}"],
    "regex_pattern": r"\[\[([AB<>=]+)\]\]",
}
"""The prompt of Arena-Hard's judge, in other words."""


def rows(name: str) -> list[dict[str, Any]]:
    return list(map(json.loads, gzip.open(STORE / f"{name}.jsonl.gz", "rt")))


class Script:
    """Verdicts by question and order, so that they can be counted by hand.

    Of every benchmark's questions, the judge prefers the model in the first third, the baseline in the second third,
    and whatever is shown first in the last.
    """

    def __init__(self, limit: int) -> None:
        alpaca = json.loads(gzip.decompress((STORE / "alpaca_eval_gpt4_baseline.json.gz").read_bytes()))
        arena = {row["uid"]: row for row in rows("arena_hard_answers_gpt-4-0314")}
        baseline = [arena[row["uid"]]["messages"][-1]["content"]["answer"] for row in rows("arena_hard_questions")]
        self.limit = limit
        self.alpaca = [row["output"] for row in alpaca[:limit]]
        self.arena = baseline[:limit]
        self.mt_bench = {row["turns"][0]: i for i, row in enumerate(rows("mt_bench_questions"))}

    def __call__(self, request: dict[str, Any]) -> Any:
        text = request["messages"][1]["content"]  # what follows may be a reminder
        if request.get("logprobs"):  # AlpacaEval
            first = self.prefers_first(text, self.alpaca, '"M"')
            return ("m" if first else "M"), {"m": math.log(0.9 if first else 0.1), "M": math.log(0.1 if first else 0.9)}
        if text.startswith("Asked:"):  # Arena-Hard
            return (
                "My verdict: [[A>B]]" if self.prefers_first(text, self.arena, "\nB says: ") else "My verdict: [[B>>A]]"
            )
        place = next(place for question, place in self.mt_bench.items() if question in text)
        return f"Good. [[{place % 10 + 1}]]"

    def prefers_first(self, text: str, baseline: list[str], second: str) -> bool:
        """`second` is what the second answer begins after."""
        place = next(i for i, answer in enumerate(baseline) if answer in text)
        baseline_first = text.index(baseline[place]) < text.index(second)
        return (not baseline_first, baseline_first, True)[3 * place // self.limit]
