"""What a judge is asked, what it replies, and what comes of many questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

Message: TypeAlias = dict[str, str]
"""One turn, with the keys "role" and "content"."""
Verdict: TypeAlias = float | str
"""What a reply comes to: a rating, a preference, a label."""


class Unreadable(Exception):
    """A reply without a verdict; the message says what is wrong with it. The judge is asked again."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model that judges answers."""

    text: str
    logprobs: Mapping[str, float] = field(default_factory=dict)
    """Of the likeliest first tokens, where the question asked for them."""


class Compared(NamedTuple):
    """Two answers that are laid before a judge, in the order in which it sees them."""

    prompt: Sequence[Message]
    """The conversation that both answer; the last turn is the user's."""
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a judge."""

    key: str
    """What it is called in a set of questions; no two have the same."""
    messages: Sequence[Message]
    """What a model that judges reads."""
    read: Callable[[Reply], Verdict]
    """Raises Unreadable when there is no verdict in a reply."""
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int = 0
    """How many of the likeliest first tokens the reply has to bring with their log-probabilities."""
    reminder: str = ""
    """What the judge is told after a reply that cannot be read, which it then goes on from; empty: it is asked anew."""
    compared: Compared | None = None
    """The same question for a judge that scores; None where it is not about two answers."""
    of_preference: Callable[[float], Verdict] = float
    """The verdict of a judge that scores, from 1 (the first answer is better), 0 or 0.5 (a tie)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What judging took. Adding two gives that of both."""

    requests: int = 0
    """Sent to the judge; verdicts out of the cache are none."""
    cached: int = 0
    """Verdicts out of the cache."""
    retries: int = 0
    """Requests that were sent again, since they failed or their reply could not be read."""
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0
    saved: float = 0.0
    """Dollars that the verdicts out of the cache had cost."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdicts on a set of questions, each asked several times."""

    verdicts: Sequence[Mapping[str, Verdict]]
    """By repeat, by key. A question that has none is not in it."""
    texts: Sequence[Mapping[str, str]]
    """By repeat, by key: what the judge wrote."""
    missing: Mapping[str, str]
    """By key, why there is no verdict, or not of every repeat."""
    usage: Usage


OnProgress: TypeAlias = Callable[[int, Usage], None]
"""Told how many verdicts there are now, and what they took."""


def _silent(done: int, usage: Usage) -> None:
    pass


class Judge(Protocol):
    """Something that compares or rates answers."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def about(self) -> str:
        """One line that says which model judges, and how it decodes: it stands under every table."""

    @property
    def key(self) -> str:
        """All that its verdicts depend on beside the questions."""

    @property
    def scores_only(self) -> bool:
        """Whether it can only tell which of two answers is better, always says the same, and in either order."""

    def ask(self, asks: Sequence[Ask], repeats: int, what: str, on_progress: OnProgress = _silent) -> Judged:
        """Ask every question `repeats` times; `what` names the work in messages.

        Raises ServiceError when the judge cannot be reached or refuses everything. What it has said is kept, and not
        asked again by the next call.
        """
