"""The comparison as tables: for the terminal, for a document, for a paper, for a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from aligndistil.errors import for_console, printable
from aligndistil.report.logs import metric_info
from aligndistil.report.results import Comparison, ModelResult, RewardResult, Threshold
from aligndistil.report.statistics import difference, estimate, interval_of_share

NOTHING = "-"
SPLITS = {"train": "training pairs", "eval": "held-out pairs"}


class Column(NamedTuple):
    """One metric of docs/metrics.md."""

    metric: str
    short: str
    """On a terminal."""
    title: str
    """In a document; see `heading`."""
    form: str
    """How its values are written."""
    better: Literal["higher", "lower"] | None = None
    """None for what describes a model without being good or bad: no value of it is the best."""
    rank: int = 99
    """Where there is no room, columns of a higher rank go first; 99 is only in files."""

    def heading(self, comparison: Comparison) -> str:
        """The title with the names of this comparison in it."""
        threshold = comparison.threshold
        reached = f"{_of_threshold(threshold)} of {threshold.value:.3g}" if threshold else "a reward"
        kl_to = label_of(comparison, comparison.kl_to)
        reward, against = (label_of(comparison, one) for one in (comparison.reward, comparison.against))
        return self.title.format(kl_to=kl_to, reward=reward, reached=reached, against=against)

    def cell(self, result: ModelResult) -> str:
        """The mean and its standard error; the interval where all prompts agree; `-` where there is no value."""
        if self.metric not in result.metrics:
            return NOTHING
        interval = result.intervals.get(self.metric, (0.0, 0.0))
        return _with_error(self.form, result.metrics[self.metric], result.errors.get(self.metric), interval)


def _with_error(form: str, mean: float, error: float | None, interval: tuple[float, float]) -> str:
    low, high = interval
    text = f"{mean:{form}}"
    if error:
        text += f" ± {error:{form}}"
    elif high > low:
        text += f" [{low:{form}}, {high:{form}}]"
    return text.replace("%", "", text.count("%") - 1)  # the unit stands once, at the end


def _signed(form: str, mean: float, low: float, high: float) -> str:
    """A difference and its interval, where there is one: what is the same everywhere is no sample of anything."""
    interval = "" if low == high else f" [{low:+{form}}, {high:+{form}}]"
    return f"{mean:+{form}}{interval}".replace("%", "")


SHARES = ("rewards/accuracies", "completions/truncated_fraction")
"""Metrics that are shares of pairs or prompts."""
_PERCENT = ".1f"
_RATING = ".2f"
BENCHMARKS = (
    Column("alpaca_eval/lc_win_rate", "AE2\nLC WR", "AlpacaEval 2 LC WR (%)", _PERCENT, "higher", 1),
    Column("alpaca_eval/win_rate", "AE2\nWR", "AlpacaEval 2 WR (%)", _PERCENT, "higher", 2),
    Column("alpaca_eval/position_bias", "AE2\nfirst", "AlpacaEval 2 position bias (points)", _PERCENT, None, 12),
    Column("alpaca_eval/repeat_spread", "AE2\nspread", "AlpacaEval 2 spread over repeats (points)", _PERCENT, None, 13),
    Column("alpaca_eval/length", "AE2\nlength", "AlpacaEval 2 mean length (characters)", ",.0f"),
    Column("mt_bench/turn_1", "MT\nturn 1", "MT-Bench turn 1", _RATING, "higher", 4),
    Column("mt_bench/turn_2", "MT\nturn 2", "MT-Bench turn 2", _RATING, "higher", 4),
    Column("mt_bench/average", "MT\navg.", "MT-Bench average", _RATING, "higher", 1),
    Column("mt_bench/repeat_spread", "MT\nspread", "MT-Bench spread over repeats", _RATING, None, 13),
    Column("arena_hard/win_rate", "AH\nWR", "Arena-Hard WR (%)", _PERCENT, "higher", 2),
    Column("arena_hard/style_controlled_win_rate", "AH\nSC WR", "Arena-Hard SC WR (%)", _PERCENT, "higher", 1),
    Column("arena_hard/position_bias", "AH\nfirst", "Arena-Hard position bias (points)", _PERCENT, None, 12),
    Column("arena_hard/repeat_spread", "AH\nspread", "Arena-Hard spread over repeats (points)", _PERCENT, None, 13),
    Column("arena_hard/length", "AH\nlength", "Arena-Hard mean length (tokens)", ",.0f"),
    Column("reward_bench_2/score", "score", "RewardBench 2 (%)", _PERCENT, "higher", 1),
    Column("reward_bench_2/factuality", "factu-\nality", "factuality", _PERCENT, "higher", 2),
    Column("reward_bench_2/precise_if", "precise\nIF", "precise IF", _PERCENT, "higher", 2),
    Column("reward_bench_2/math", "math", "math", _PERCENT, "higher", 2),
    Column("reward_bench_2/safety", "safety", "safety", _PERCENT, "higher", 2),
    Column("reward_bench_2/focus", "focus", "focus", _PERCENT, "higher", 2),
    Column("reward_bench_2/ties", "ties", "ties", _PERCENT, "higher", 2),
    Column("human_agreement/agreement", "human\nagreement", "human agreement (%)", _PERCENT, "higher", 1),
    Column("human_agreement/spearman", "Spear-\nman", "Spearman", _RATING, "higher", 2),
    Column("human_agreement/pearson", "Pear-\nson", "Pearson", _RATING, "higher", 2),
    Column("human_agreement/repeat_spread", "spread", "spread over repeats (points)", _PERCENT, None, 13),
    Column("human_agreement/price", "$ per\n1,000", "price ($ per 1,000 pairs)", _RATING, None, 3),
    Column("pairwise/win_rate", "win\nrate", "win rate against {against} (%)", _PERCENT, "higher", 2),
    Column("pairwise/tie_rate", "ties", "ties (%)", _PERCENT, None, 11),
    Column("pairwise/position_bias", "first", "position bias (points)", _PERCENT, None, 12),
    Column("pairwise/repeat_spread", "spread", "spread over repeats (points)", _PERCENT, None, 13),
)
"""What judges say, as `aligndistil evaluate` and a recipe's `report.benchmarks` ask them."""
COLUMNS = (
    Column("gold_reward", "gold\nreward", "gold reward", "z.2f", "higher", 1),
    Column("rewards/accuracies", "reward\naccuracy", "reward accuracy (held-out pairs)", ".1%", "higher", 3),
    Column("reward_score", "reward\nscore", "score by {reward}", "z.2f", "higher", 5),
    *BENCHMARKS,
    Column("kl_initial", "KL to\ninitial", "KL to initial (nats per response)", ".2f", None, 2),
    Column("kl", "KL", "KL to {kl_to} (nats per response)", ".2f", None, 6),
    Column("kl_data", "KL on\ndata", "KL to {kl_to} on the data's responses (nats)", ".2f"),
    Column("kl_initial_data", "initial,\non data", "KL to initial on the data's responses (nats)", ".2f"),
    Column("completions/mean_length", "length", "mean length (tokens)", ".1f", None, 4),
    Column("length_characters", "charac-\nters", "mean length (characters)", ".0f"),
    Column("completions/truncated_fraction", "trun-\ncated", "truncated", ".1%", None, 11),
    Column("distinct_1", "distinct\n1", "distinct-1", ".3f"),
    Column("distinct_2", "distinct\n2", "distinct-2", ".3f", None, 7),
    Column("steps_to_reward", "steps to\nreward", "steps to {reached}", ",.0f", "lower", 8),
    Column("steps", "steps", "steps", ",.0f", None, 10),
    Column("seconds", "secs", "seconds", ",.0f", None, 9),
    Column("compute_seconds", "compute\nsecs", "compute (seconds of steps, with the stages it needs)", ",.0f"),
    Column("tokens_per_second", "tokens/s", "tokens/s", ",.0f"),
    Column("peak_memory_gib", "GiB", "peak memory (GiB)", ".2f"),
)
BY_METRIC = {column.metric: column for column in COLUMNS}


@dataclass(frozen=True, slots=True)
class Cells:
    """A table as text."""

    heads: list[str]
    rows: list[list[str]]
    text: int
    """The first columns, which are words and not numbers."""
    notes: list[str]
    bold: set[tuple[int, int]] = field(default_factory=set)
    """(row, column)"""

    def texts(self, escaped: Callable[[str], str], bold: str) -> list[list[str]]:
        """The heads and then the rows, as a format wants them; `bold` has a `{}` for the cell."""
        texts = [[escaped(cell) for cell in row] for row in (self.heads, *self.rows)]
        for i, j in self.bold:
            texts[i + 1][j] = bold.format(texts[i + 1][j])
        return texts


def label_of(comparison: Comparison, model: object) -> str:
    """What a table calls a model that others are compared with: by the label of its row, where it is one."""
    labels = {result.name: result.label for result in comparison.results}
    return labels.get(str(model), str(model or ""))


def columns_of(comparison: Comparison, *, main: bool = False) -> list[Column]:
    """What the recipe asks for, in its order, or else all, or those that a page has room for; without empty ones."""
    results = comparison.results
    if comparison.columns is None:
        # Where `kl` is to the initial model, it is not shown beside `kl_initial`.
        same = all(result.metrics.get("kl") == result.metrics.get("kl_initial") for result in results)
        asked = [column for column in COLUMNS if not ((main and column.rank == 99) or (same and column.metric == "kl"))]
    else:
        asked = [BY_METRIC[metric] for metric in comparison.columns]
    return [column for column in asked if any(column.metric in result.metrics for result in results)]


def comparison_cells(comparison: Comparison, columns: Sequence[Column], *, short: bool = False) -> Cells:
    """A row for each model. `short` has the headings of a terminal, and leaves the stages' names out."""
    results = comparison.results
    words = {"model": [result.label for result in results]}
    if not short and any(result.label != result.name for result in results):
        words["stage"] = [result.name for result in results]
    if len({result.seeds for result in results}) > 1:
        words["seeds"] = [str(result.seeds) for result in results]
    heads = [*words, *(column.short if short else column.heading(comparison) for column in columns)]
    numbers = [[column.cell(result) for result in results] for column in columns]
    rows = [list(row) for row in zip(*words.values(), *numbers, strict=True)]
    bold = {
        (i, len(words) + j)
        for i, result in enumerate(results)
        for j, column in enumerate(columns)
        if comparison.best.get(column.metric) == result.name
    }
    return Cells(heads, rows, len(words), _notes(comparison, columns), bold)


def _notes(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    """Sentences that a reader of a table of these columns needs."""
    there = {column.metric for column in columns}
    threshold = comparison.threshold
    lines = {
        "rewards/accuracies": "Reward accuracy: held-out pairs that a model's own reward ranks right (a reward model's "
        "score; log-ratio to the reference it was trained with; SimPO's mean log-probability).",
        "reward_score": f"Reward score: mean score of the samples by {label_of(comparison, comparison.reward)}.",
        "kl": f"KL is to {label_of(comparison, comparison.kl_to)}, in nats, summed over a response of the model's own.",
        "kl_initial": "KL to initial: to the model that training began from, in nats per response of the model's own.",
        "completions/mean_length": "Length is in tokens.",
    }
    if threshold is not None:
        lines["steps_to_reward"] = (
            f"Steps to reward: the first logged step at which the {_of_threshold(threshold)} (a moving average, where "
            f"there are 24 points or more) is {threshold.value:.3g} ({threshold.chosen}); - where there is no such "
            "curve, where it begins there, or where a seed does not get there."
        )
    said = [line for metric, line in lines.items() if metric in there]
    if comparison.show_rewards and not comparison.rewards:
        said.append("No rewards to compare: the eval data have no pairs, or no model has a reward of its own.")
    counts = {result.seeds for result in comparison.results}
    has_errors = any(result.errors for result in comparison.results)
    if has_errors and counts == {1}:
        said.append(
            "± is the standard error over prompts (or pairs): of these trained models, not of another training."
        )
    elif has_errors:
        seeds = f"{counts.pop()} seeds" if len(counts) == 1 else "the seeds of each row"
        said.append(f"Mean ± standard error over {seeds}, and over prompts (or pairs) where it is measured on them.")
        if comparison.differences:
            said.append(
                "Bold: better than every other row, paired by seed and prompt, at the 5 % level after Holm's "
                "correction for the number of rows."
            )
    return [*said, *comparison.judged, *comparison.notes]


def _of_threshold(threshold: Threshold) -> str:
    """What its metric is called, in a sentence."""
    title = metric_info(threshold.metric).title
    return title[:1].lower() + title[1:]


def difference_cells(comparison: Comparison, columns: Sequence[Column]) -> Cells | None:
    """How far each model is from the best of a column, with a 95 % interval; None where nothing can be compared."""
    best = {one.metric: label_of(comparison, one.best) for one in comparison.differences}
    found = {(one.metric, one.name): one for one in comparison.differences}
    shown = [column for column in columns if column.metric in best]
    if not shown:
        return None
    heads = ["model", *(f"{column.heading(comparison)}, less {best[column.metric]}" for column in shown)]
    rows = []
    for result in comparison.results:
        ones = {column: found.get((column.metric, result.name)) for column in shown}
        cells = [_signed(column.form, one.mean, one.low, one.high) if one else NOTHING for column, one in ones.items()]
        if any(ones.values()):
            rows.append([result.label, *cells])
    several = any(result.seeds > 1 for result in comparison.results)
    note = (
        f"Difference to the best mean of the column, paired by prompt{' and seed' if several else ''}, each with its "
        "own 95 % interval. The best was chosen by the same numbers, which makes differences to it look somewhat "
        f"larger than they are.{'' if several else ' Of these trained models, not of another training.'}"
    )
    return Cells(heads, rows, 1, [note])


def reward_cells(rewards: Sequence[RewardResult], *, short: bool = False) -> Cells:
    """A row for each reward: its accuracy on either split, and the difference to the one that all are compared with.

    `short` leaves the differences on the training pairs out.
    """
    splits = [split for split in SPLITS if any(reward.shares(split) for reward in rewards)]
    heads = ["reward", "kind", *(f"{SPLITS[split]} (%)" for split in splits)]
    rows = [[reward.name, reward.kind, *(_accuracy(reward, split) for split in splits)] for reward in rewards]
    seeds = max(len(marks) for reward in rewards for marks in reward.right.values())
    counts = [
        f"{next(len(shares[0]) for reward in rewards if (shares := reward.shares(split))):,} {SPLITS[split]}"
        for split in splits
    ]
    notes = [
        "Share of pairs whose chosen response has the larger reward; a tie counts as half. ± is the standard error "
        + (f"over pairs and {seeds} seeds." if seeds > 1 else "over pairs: of these trained models."),
        f"Of {' and '.join(counts)}.",
    ]
    if len(rewards) > 1:
        other = next((reward for reward in rewards if reward.kind == "contrastive"), rewards[0])
        compared = [split for split in splits if split == "eval" or not short]
        heads += [f"difference, {SPLITS[split]}" for split in compared]
        for reward, row in zip(rewards, rows, strict=True):
            row += [_accuracy_difference(reward, other, split) for split in compared]
        notes.append(f"Differences to {other.name} are in points, of the same pairs, with their 95 % intervals.")
    return Cells(heads, rows, 2, notes)


def _accuracy(reward: RewardResult, split: str) -> str:
    shares = reward.shares(split)
    if not shares:
        return NOTHING
    found = estimate(shares)
    return _with_error(".1%", found.mean, found.error, interval_of_share(shares)).replace("%", "")


def _accuracy_difference(reward: RewardResult, other: RewardResult, split: str) -> str:
    ours, theirs = reward.shares(split), other.shares(split)
    same = reward.measured_on == other.measured_on and [*map(len, ours)] == [*map(len, theirs)]
    if reward is other or not ours or not same:
        return NOTHING
    found, _ = difference(ours, theirs)
    return _signed(".1%", found.mean, *found.interval)


# ---- as text


def all_cells(comparison: Comparison, columns: Sequence[Column]) -> dict[str, Cells]:
    """The comparison, its differences, and the rewards where they were asked for."""
    tables = {"comparison": comparison_cells(comparison, columns)}
    if (differences := difference_cells(comparison, columns)) is not None:
        tables["differences"] = differences
    if comparison.show_rewards and comparison.rewards:
        tables["rewards"] = reward_cells(comparison.rewards)
    return tables


def markdown(comparison: Comparison) -> str:
    """All columns, or those the recipe asks for, with what a reader has to know below them."""
    text = ""
    for name, cells in all_cells(comparison, columns_of(comparison)).items():
        text += (f"\n## {name.capitalize()}\n\n" if text else "") + markdown_table(cells)
        text += "".join(f"\n{note}\n" for note in cells.notes)
    return text


def summary(comparison: Comparison) -> str:
    """The main columns, with their notes: for a model card."""
    cells = comparison_cells(comparison, columns_of(comparison, main=True))
    return markdown_table(cells) + "\n" + " ".join(cells.notes) + "\n"


def markdown_table(cells: Cells) -> str:
    head, *rows = cells.texts(lambda cell: cell.replace("|", "\\|"), "**{}**")
    rule = ["---" if i < cells.text else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def latex(comparison: Comparison) -> str:
    """A `table` for each of the tables, with the main columns; needs booktabs and graphicx."""
    lines = [r"% Needs \usepackage{booktabs} and \usepackage{graphicx}."]
    for name, cells in all_cells(comparison, columns_of(comparison, main=True)).items():
        texts = cells.texts(lambda cell: cell.translate(_LATEX), r"\textbf{{{}}}")
        head, *rows = (" & ".join(row) + r" \\" for row in texts)
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{' '.join(cells.notes).translate(_LATEX)}}}",
            rf"\label{{tab:{name}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",  # no wider than the page
            rf"\begin{{tabular}}{{{'l' * cells.text + 'r' * (len(cells.heads) - cells.text)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    return "\n".join(lines)


_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"[": "{[}", "*": "{*}"}  # after a line's end these would be its arguments
    | {character: f"\\{character}" for character in "&%$#_{}"}
)
"""What LaTeX would not print as it stands."""


def csv(comparison: Comparison) -> str:
    """Every metric of every model in full precision, under its own name, with what is known of its error.

    `METRIC_se` is the standard error, `METRIC_low` and `METRIC_high` the 95 % interval, `METRIC_std` the standard
    deviation over seeds.
    """
    names = dict.fromkeys([*BY_METRIC, *(name for result in comparison.results for name in result.metrics)])
    rows = []
    for result in comparison.results:
        row: dict[str, object] = {"name": result.name, "label": result.label, "objective": result.objective}
        row["seeds"] = result.seeds
        for name in names:
            low, high = result.intervals.get(name, (None, None))
            row |= {name: result.metrics.get(name), f"{name}_se": result.errors.get(name)}
            row |= {f"{name}_low": low, f"{name}_high": high, f"{name}_std": result.spread.get(name)}
        rows.append(row)
    return _csv(rows)


def rewards_csv(rewards: Sequence[RewardResult]) -> str:
    """Full precision: accuracy, standard error and interval of each reward and split."""
    rows: list[dict[str, object]] = []
    for reward in rewards:
        for split in SPLITS:
            shares = reward.shares(split)
            if shares:
                found, (low, high) = estimate(shares), interval_of_share(shares)
                row: dict[str, object] = {"reward": reward.name, "kind": reward.kind, "split": split}
                row |= {"pairs": len(shares[0]), "seeds": len(shares), "accuracy": found.mean}
                rows.append(row | {"standard_error": found.error, "low_95": low, "high_95": high})
    return _csv(rows)


def differences_csv(comparison: Comparison) -> str:
    """Full precision."""
    return _csv([one.model_dump() for one in comparison.differences])


def _csv(rows: Sequence[dict[str, object]]) -> str:
    """Without the columns that nothing is in; empty without rows."""
    return str(pd.DataFrame(rows).dropna(axis="columns", how="all").to_csv(index=False)) if rows else ""


# ---- on the terminal


def rich_table(comparison: Comparison, width: int | None = None) -> Group:
    """For the terminal, in `width` columns (what the terminal has). Columns give way by importance.

    The recipe's own choice of columns is kept; the terminal then wraps them.
    """
    room = width or Console().width
    columns = columns_of(comparison, main=True)
    while True:
        cells = comparison_cells(comparison, columns, short=True)
        fits = Console(width=1000).measure(_table(cells)).maximum <= room
        if fits or comparison.columns is not None or len(columns) < 2:
            return _rich(cells)
        columns.remove(max(columns, key=lambda column: column.rank))


def rich_differences(comparison: Comparison) -> Group | None:
    """For the terminal: of the most important column."""
    compared = {one.metric for one in comparison.differences}
    columns = [column for column in columns_of(comparison) if column.metric in compared]
    cells = difference_cells(comparison, sorted(columns, key=lambda column: column.rank)[:1])
    return None if cells is None else _rich(cells)


def rich_rewards(rewards: Sequence[RewardResult]) -> Group:
    """For the terminal: without the differences on the training pairs."""
    return _rich(reward_cells(rewards, short=True))


def _rich(cells: Cells) -> Group:
    """A table, and its notes as wide as the terminal."""
    return Group(_table(cells), Text(printable("\n".join(cells.notes)), style="dim italic"))


def _table(cells: Cells) -> Table:
    heads, *rows = cells.texts(lambda cell: for_console(cell.replace(" ± ", "±")), "[bold]{}[/]")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for i, head in enumerate(heads):
        words = i < cells.text
        table.add_column(head, justify="left" if words else "right", vertical="bottom", no_wrap=not words)
    for row in rows:
        table.add_row(*row)
    return table
