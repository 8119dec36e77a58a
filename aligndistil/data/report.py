"""What became of the rows of a source: used, truncated, or dropped, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ROWS_NAMED = 5
"""Row numbers kept for each reason."""
REASONS_NAMED = 6


@dataclass(slots=True)
class Dropped:
    """The rows dropped for one reason."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    """The numbers of the first of them, from 1, in the order in which the split or slice is read."""

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.rows) < ROWS_NAMED:
            self.rows.append(row)

    def merge(self, other: Dropped) -> None:
        """Add those of rows that come later, or of another source."""
        self.count += other.count
        self.rows = (self.rows + other.rows)[:ROWS_NAMED]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.rows) else ""
        return f"{self.count} (rows {', '.join(map(str, self.rows))}{more})"


@dataclass(slots=True)
class DropReport:
    """Counts over the sources of a section. An example is a pair, or one response, or one prompt."""

    rows_read: int = 0
    used: int = 0
    """Examples, before weights repeat or sub-sample them."""
    left_out: int = 0
    """Undesirable rows where only desirable responses are asked for: not a fault."""
    held_out: int = 0
    """Examples on the other side of `data.eval.fraction`."""
    truncated_prompts: int = 0
    truncated_responses: int = 0
    """Responses, so that a pair can count twice."""
    shifted: int = 0
    """Examples whose boundary between prompt and response had to be moved."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """By reason."""
    notes: list[str] = field(default_factory=list)
    """Which files were read, what of them was not, and what a person should know of the set as a whole."""

    @property
    def dropped_count(self) -> int:
        return sum(dropped.count for dropped in self.dropped.values())

    @property
    def dropped_fraction(self) -> float:
        """Of the examples that were used or dropped; 0 when there was none."""
        return self.dropped_count / max(1, self.used + self.dropped_count)

    def drop(self, reason: str, row: int) -> None:
        self.dropped.setdefault(reason, Dropped()).add(row)

    def reasons(self) -> str:
        """The reasons in one line, the most frequent first."""
        ranked = sorted(self.dropped.items(), key=lambda item: -item[1].count)
        told = [f"{reason}: {dropped}" for reason, dropped in ranked[:REASONS_NAMED]]
        rest = sum(dropped.count for _, dropped in ranked[REASONS_NAMED:])
        return "; ".join([*told, *([f"other reasons: {rest}"] if rest else [])])

    def lines(self) -> list[str]:
        """What a person should know, one fact a line."""
        facts = [f"{self.rows_read} rows read, {self.used} examples used"]
        if self.left_out:
            facts.append(f"{self.left_out} undesirable rows left out")
        if self.held_out:
            facts.append(f"{self.held_out} examples on the other side of data.eval.fraction")
        if self.truncated_prompts or self.truncated_responses:
            facts.append(f"{self.truncated_prompts} prompts and {self.truncated_responses} responses truncated")
        if self.shifted:
            facts.append(f"{self.shifted} boundaries between prompt and response moved")
        if self.dropped:
            facts.append(f"{self.dropped_count} dropped ({self.dropped_fraction:.1%}): {self.reasons()}")
        return facts + self.notes


def merge_reports(reports: Iterable[DropReport]) -> DropReport:
    """The sum over sources. Row numbers are those of each row's own source."""
    total = DropReport()
    for report in reports:
        total.rows_read += report.rows_read
        total.used += report.used
        total.left_out += report.left_out
        total.held_out += report.held_out
        total.truncated_prompts += report.truncated_prompts
        total.truncated_responses += report.truncated_responses
        total.shifted += report.shifted
        for reason, dropped in report.dropped.items():
            total.dropped.setdefault(reason, Dropped()).merge(dropped)
        total.notes += report.notes
    return total
