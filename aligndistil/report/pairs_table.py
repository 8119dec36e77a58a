"""The rewards beside each other, as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from aligndistil.report.columns import NOTHING
from aligndistil.report.pairs import SPLITS, Estimate, accuracy, compared_with, difference
from aligndistil.report.results import RewardResult
from aligndistil.report.table import markdown

HEADS = ("reward", "kind", "split", "pairs", "seeds", "accuracy", "standard_error")
PAIRED_HEADS = ("compared_with", "difference", "low_95", "high_95")


class Cells(NamedTuple):
    """A table as text."""

    heads: list[str]
    rows: list[list[str]]
    captions: list[str]


def reward_cells(rewards: Sequence[RewardResult]) -> Cells:
    """A row for each reward: its accuracy on either split, and the difference to the one that all are compared with."""
    other = compared_with(rewards)
    splits = [split for split in SPLITS if accuracy(other, split) is not None]
    accuracies = [f"{SPLITS[split]} (%)" for split in splits]
    differences = [f"difference, {SPLITS[split]}" for split in splits] if len(rewards) > 1 else []
    rows = []
    for reward in rewards:
        row = [reward.name, reward.kind, *(_accuracy(accuracy(reward, split)) for split in splits)]
        if differences:
            row += [NOTHING if reward is other else _difference(difference(reward, other, split)) for split in splits]
        rows.append(row)
    return Cells(["reward", "kind", *accuracies, *differences], rows, _captions(rewards, splits))


def _accuracy(found: Estimate | None) -> str:
    return NOTHING if found is None else f"{100 * found.mean:.1f} ± {100 * found.error:.1f}"


def _difference(found: Estimate | None) -> str:
    if found is None:
        return NOTHING
    low, high = found.interval
    return f"{100 * found.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _captions(rewards: Sequence[RewardResult], splits: Sequence[str]) -> list[str]:
    seeds = max(len(bits) for reward in rewards for bits in reward.right.values())
    lines = ["Share of pairs whose chosen response has the larger reward, summed over its tokens; a tie is wrong."]
    for split in splits:
        found = [estimate for reward in rewards if (estimate := accuracy(reward, split))]
        low, high = (100 * of(estimate.error for estimate in found) for of in (min, max))
        error = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
        lines.append(f"{found[0].pairs:,} {SPLITS[split]}: the standard error (after ±) is {error} points.")
    if len(rewards) > 1:
        other = compared_with(rewards).name
        lines.append(f"Differences to {other} are in points, of the same pairs, with a 95 % interval (normal, paired).")
    if seeds > 1:
        lines.append(f"Each pair counts with the share of {seeds} seeds that rank it right.")
    return lines


def rewards_markdown(rewards: Sequence[RewardResult]) -> str:
    """For a document."""
    cells = reward_cells(rewards)
    return markdown(cells.heads, cells.rows, left=2) + "".join(f"\n{line}\n" for line in cells.captions)


def rewards_rich(rewards: Sequence[RewardResult]) -> Table:
    """For the terminal: without the differences on the training pairs."""
    cells = reward_cells(rewards)
    shown = [i for i, head in enumerate(cells.heads) if not (head.startswith("difference") and "training" in head)]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, caption_justify="left")
    for i in shown:
        table.add_column(escape(cells.heads[i]), justify="left" if i < 2 else "right", overflow="fold", no_wrap=i == 0)
    for row in cells.rows:
        table.add_row(*(escape(row[i]) for i in shown))
    table.caption = escape(" ".join(cells.captions))
    return table


def rewards_csv(rewards: Sequence[RewardResult]) -> str:
    """Full precision: accuracy, standard error, pairs, seeds, and the difference with its interval."""
    other = compared_with(rewards)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADS, *PAIRED_HEADS])
    for reward in rewards:
        for split in SPLITS:
            found = accuracy(reward, split)
            if found is None:
                continue
            paired = None if reward is other else difference(reward, other, split)
            rest = ["", "", "", ""] if paired is None else [other.name, paired.mean, *paired.interval]
            seeds = len(reward.right[split])
            writer.writerow([reward.name, reward.kind, split, found.pairs, seeds, found.mean, found.error, *rest])
    return text.getvalue()
