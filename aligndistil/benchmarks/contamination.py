"""Whether a model was trained on a benchmark's questions: then its score on them says little of others.

Compared are words, in lower case and without punctuation. A turn of a question is found in a training prompt when both
share 13 words in a row (the length that Brown et al. 2020, arXiv 2005.14165, app. C, remove training text by); a first
turn that is shorter, when it is the whole of a training prompt's turn. Languages that put no spaces between words are
seen less well: a long passage counts as few words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aligndistil.benchmarks.base import Question
from aligndistil.data import Record, content_hash, prompts_of
from aligndistil.errors import UserError
from aligndistil.recipe import Data, Source, stage_of
from aligndistil.recipe.sections import HeldOut
from aligndistil.run_folder import RunFolder, StageFolder

SHARE_REFUSED = 0.01
"""A model that was trained on a larger share of a benchmark's questions is refused a score on it."""
CHANCE = 2
"""So many questions may be met by chance however few there are: 1 % of MT-Bench is less than one of them."""
GRAM = 13
"""Words in a row."""
SHORTEST = 3
"""Words of a short turn; fewer say too little to be found."""
PUBLISHED = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval",),
    "mt_bench": ("lmsys/mt_bench", "HuggingFaceH4/mt_bench_prompts", "philschmid/mt-bench"),
    "arena_hard": ("lmarena-ai/arena-hard-auto",),
    "reward_bench_2": ("allenai/reward-bench-2",),
}
"""By benchmark, how the names of data sets of the Hub begin that are the benchmark itself."""
_WORD = re.compile(r"[^\W_]+")
_RECIPE = re.compile(r"^## Recipe\n\n(?P<fence>`{3,})yaml\n(?P<recipe>.*?)\n(?P=fence)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a model was trained on, with the models that it came of."""

    sources: list[tuple[Source, HeldOut | None]] = field(default_factory=list)
    """Each with what was held out of it."""
    unknown: list[str] = field(default_factory=list)
    """What is not known, as the end of a sentence: `the data of stage sft (its folder is gone)`."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """What of a benchmark was found in training data."""

    questions: list[str]
    """Ids of the questions that were found, in the benchmark's order."""
    total: int
    """Questions that were looked for."""
    sources: list[str]
    """Where they were found: path and split."""
    unknown: list[str]
    """What could not be searched, and why."""

    @property
    def refused(self) -> bool:
        """Whether it is more than chance, so that a score would have to be allowed."""
        return len(self.questions) > max(SHARE_REFUSED * self.total, CHANCE)


def training_data(path: str) -> TrainingData | None:
    """What the model in a folder was trained on; None where that is not known, as of all models of the Hub.

    Known are a stage's folder, the `final` in it, and a folder with the model card that a stage is given. The stages
    that it was trained with count too (teachers, a reward model, what it starts from), also those of other runs.
    """
    found = TrainingData()
    return found if _collect(path, found, set()) else None


def _collect(path: str, into: TrainingData, seen: set[Path]) -> bool:
    """Add what is known of the model at `path` to `into`; False where that is nothing."""
    folder = Path(path).expanduser().resolve()
    folder = folder.parent if folder.name == "final" and (folder.parent / "done.json").is_file() else folder
    if folder in seen:
        return True
    seen.add(folder)
    done = StageFolder(folder).read_done()
    resolved = done.resolved if done is not None else _of_card(folder)
    if resolved is None:
        return False
    try:
        data = Data.model_validate(resolved["data"])
        read = [(source, data.held_out) for source in data.train]
        into.sources.extend(one for one in read if one not in into.sources)
        others = [str(resolved["model"]["path"]), *map(str, resolved["models"].values())]
    except (KeyError, TypeError, AttributeError, ValidationError):
        into.unknown.append(f"the data of {folder} (another version of aligndistil trained it)")
        return True
    for other in dict.fromkeys(others):
        if (name := stage_of(other)) is None:
            _collect(other, into, seen)
            continue
        stage = RunFolder(folder.parent).stage(name)
        its = stage.read_done() if done is not None else None
        if done is None or its is None or its.weights != done.inputs.get(name):
            into.unknown.append(f"the data of stage {name} (its folder is not there, or it was trained again)")
        else:
            _collect(str(stage.path), into, seen)
    return True


def _of_card(folder: Path) -> dict[str, Any] | None:
    """The resolved stage in the model card of a folder; None without such a card."""
    card = folder / "README.md"
    if not card.is_file() or (found := _RECIPE.search(card.read_text(encoding="utf-8", errors="replace"))) is None:
        return None
    try:
        resolved = yaml.safe_load(found["recipe"])
    except yaml.YAMLError:
        return None
    return resolved if isinstance(resolved, dict) and {"objective", "data", "models"} <= resolved.keys() else None


def find(data: TrainingData, questions: Sequence[Question], benchmark: str) -> Contamination:
    """Look for the questions of the benchmark of that name in training data.

    All rows of every source are read; one that cannot be is in `unknown`. A source that is the benchmark itself
    (`PUBLISHED`) holds all questions, whatever its rows look like.
    """
    found: set[int] = set()
    where: list[str] = []
    unknown = list(data.unknown)
    for source, held in data.sources:
        name = f"{source.path}, split {source.split}"
        try:
            if source.path.lower().startswith(tuple(map(str.lower, PUBLISHED.get(benchmark, ())))):
                here = set(range(len(questions)))
            else:
                # The stages of a run share their data, which is read once.
                read_as = source.model_dump_json(), held and held.model_dump_json(), content_hash(source)
                key = *read_as, tuple(question.key() for question in questions)
                if key not in _SEARCHED:
                    _SEARCHED[key] = _search(prompts_of(source, "train", held), questions)
                here = _SEARCHED[key]
        except UserError as error:
            unknown.append(f"{name} ({error})")
            continue
        if here:
            where.append(name)
            found |= here
    return Contamination([questions[i].id for i in sorted(found)], len(questions), where, unknown)


_SEARCHED: dict[tuple[object, ...], set[int]] = {}


def _search(prompts: Iterable[Record], questions: Sequence[Question]) -> set[int]:
    """The places of the questions that are found among prompts. Raises UserError when these cannot be read."""
    grams: dict[tuple[str, ...], set[int]] = {}
    wholes: dict[tuple[str, ...], set[int]] = {}
    for i, question in enumerate(questions):
        for number, turn in enumerate(question.turns):
            words = _words(turn)
            for gram in _grams(words):
                grams.setdefault(gram, set()).add(i)
            # A short second turn ("Now make it shorter.") is nobody's question without the first.
            if number == 0 and SHORTEST <= len(words) < GRAM:
                wholes.setdefault(tuple(words), set()).add(i)
    found: set[int] = set()
    known_grams = frozenset(grams)
    for text in _user_turns(prompts):
        words = _words(text)
        for gram in known_grams.intersection(_grams(words)):
            found |= grams[gram]
        if len(words) < GRAM:
            found |= wholes.get(tuple(words), set())
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(GRAM)), strict=False)


def _user_turns(prompts: Iterable[Record]) -> Iterator[str]:
    for record in prompts:
        if isinstance(record.prompt, str):
            yield record.prompt
        else:
            yield from (turn["content"] for turn in record.prompt if turn["role"] == "user")


def refusal(found: Contamination, benchmark: str, model: str) -> str | None:
    """Why a model is given no score on a benchmark (its title); None where it may have one."""
    if not found.refused:
        return None
    return (
        f"{model} was trained on {_counts(found)} questions of {benchmark}, {found.questions[0]} for one (in "
        f"{'; '.join(found.sources)}), and its score would not be comparable: leave it out, or give "
        "--allow-contaminated (in a recipe `report.allow_contaminated`), which marks it in the table"
    )


def note(found: Contamination, benchmark: str, model: str) -> str | None:
    """What has to stand under a table with the model's score; None where all data was searched and nothing found."""
    parts = []
    if found.questions:
        how = "scored because of --allow-contaminated" if found.refused else "few enough to be scored"
        where = f"(in {'; '.join(found.sources)}; {how})"
        parts.append(f"was trained on {_counts(found)} questions of {benchmark}, {found.questions[0]} for one {where}")
    if found.unknown:
        unknown = "; ".join(found.unknown)
        parts.append(f"may have met {benchmark} in training, for this could not be searched: {unknown}")
    return f"{model} {', and '.join(parts)}." if parts else None


def _counts(found: Contamination) -> str:
    return f"{len(found.questions)} of the {found.total}"
