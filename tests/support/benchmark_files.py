"""The benchmarks' own files, which are not part of the repository, and what stands in for one of them."""

from pathlib import Path

STORE = Path(__file__).parents[3] / "shared" / "data"
"""They lie beside the repository, where somebody has put them there."""
ARENA_JUDGE = {
    "system_prompt": "Which answer is better? End with a label.",
    "prompt_template": ["Asked: {question_1}\nA says: {answer_1}\nB says: {answer_2}"],
    "regex_pattern": r"\[\[([AB<>=]+)\]\]",
}
"""The prompt of Arena-Hard's judge, in other words."""
