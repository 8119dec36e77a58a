"""The grammar of short movie reviews behind `builtin:tiny` and `builtin:reviews`, and its exactly known gold reward.

A review has a latent leaning (positive, negative or mixed) that its opinion words mostly follow, so an early opinion
foretells the later ones; the review repeats what the prompt says of the film (title, genre, year, ...), and obeys the
number of sentences that most prompts ask for, which leaves an objective little to gain by mere length.
No sentence negates: the gold reward, the mean sentiment of the opinion words, is therefore exact, and blind to length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random
from typing import Final, TypeVar

_T = TypeVar("_T")

_SCORES: Final = (1.0, 0.5, -0.5, -1.0)

_OPINIONS: Final[dict[str, tuple[str, str, str, str]]] = {
    "film_adj": (
        "brilliant superb wonderful masterful magnificent unforgettable flawless",
        "good solid pleasant decent charming likable enjoyable",
        "weak bland dull forgettable uneven stale mediocre",
        "terrible awful dreadful horrible atrocious abysmal miserable",
    ),
    "acting_adj": (
        "riveting magnetic heartbreaking electric",
        "convincing natural warm sincere",
        "stiff mannered hollow lazy",
        "wooden laughable painful ridiculous",
    ),
    "story_adj": (
        "gripping ingenious profound thrilling",
        "clever engaging thoughtful tidy",
        "predictable muddled shallow contrived",
        "idiotic incoherent insulting absurd",
    ),
    "craft_adj": (
        "gorgeous breathtaking exquisite stunning",
        "elegant crisp polished handsome",
        "murky drab cheap noisy",
        "hideous ugly garish amateurish",
    ),
    "pace_adj": (
        "exhilarating irresistible hypnotic",
        "brisk lively steady",
        "slow sluggish plodding",
        "excruciating unbearable insufferable",
    ),
    "viewer_adj": (
        "enchanted thrilled overjoyed",
        "amused content cheerful",
        "bored tired impatient",
        "furious appalled disgusted",
    ),
    "verdict": (
        "masterpiece triumph gem treasure",
        "treat pleasure success delight",
        "disappointment letdown bore chore",
        "disaster travesty catastrophe fiasco",
    ),
    "felt": (
        "adored loved cherished",
        "liked enjoyed admired",
        "disliked regretted resented",
        "hated loathed despised",
    ),
    "does": (
        "dazzles soars astonishes",
        "charms pleases satisfies",
        "drags stumbles disappoints",
        "collapses infuriates repels",
    ),
    "manner": (
        "brilliantly beautifully superbly",
        "nicely neatly gracefully",
        "poorly awkwardly clumsily",
        "terribly horribly dreadfully",
    ),
}  # fmt: skip

_FACTS: Final[dict[str, str]] = {
    "genre": "thriller comedy drama western mystery romance musical fantasy documentary satire",
    "kind": "film movie picture",
    "acting": "acting cast ensemble dialogue",
    "story": "plot script story ending premise",
    "craft": "photography lighting scenery music editing",
    "pace": "pace opening middle finale",
    "role": "doctor sailor farmer teacher detective painter baker soldier nurse pilot lawyer singer widow thief "
    "priest student gardener waiter judge carpenter",
    "place": "Lisbon Vienna Cairo Boston Dublin Oslo Havana Naples Prague Kyoto Denver Quebec Tunis Madrid Glasgow "
    "Lima",
    "plot": "finds a hidden letter|loses a brother|inherits an old house|searches for a missing child|"
    "steals a painting|crosses the mountains|returns to a village|opens a small hotel|defends a stranger|"
    "learns to dance|writes to a prisoner|builds a boat|follows a spy|wins the lottery|forgets a promise|"
    "sells the family farm",
    "when": "yesterday|last night|on Sunday|during the holidays|at a festival|on a train",
    "company": "my sister|my neighbours|an old friend|two colleagues|my parents|the children",
    "length": "ninety minutes|one hundred minutes|about two hours|nearly three hours|just over an hour",
    "when_in_film": "throughout|in every scene|from start to finish|in the second half|at first|by the end",
}
_FIRST: Final = (
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Louis Maria Nadia Oscar Paula Rosa Simon Tara "
    "Viktor"
)
_LAST: Final = (
    "Alvarez Becker Costa Duval Eriksen Fischer Garcia Holm Ivanov Jensen Keller Lindgren Moreau Novak Okafor Petrov "
    "Quinn Rossi Sato Turner"
)
_TITLE_ADJ: Final = (
    "Silent Golden Broken Distant Crimson Frozen Velvet Paper Wandering Northern Second Iron Borrowed Scarlet Lonely "
    "Midnight Painted Sleeping Salt Amber"
)
_TITLE_NOUN: Final = (
    "Harbor Garden River Mirror Orchard Lantern Window Station Island Bridge Winter Tower Forest Letter Crown Road "
    "Shadow Kingdom Summer Door"
)

_PROMPTS: Final = (
    "Write a short review of the {genre} {title}.",
    "What did you think of {title}?",
    "Tell me about {title}, a {genre} from {year}.",
    "Review {title} by {director}.",
    "Is the {genre} {title} worth seeing?",
    "We may watch {title} with {actor} tonight. What should we expect?",
    "Give me your view of the {year} {genre} {title}.",
    "My sister wants to see {title}. Tell her about it.",
    "Describe the {genre} that {director} made in {year}, {title}.",
    "How is {actor} in {title}?",
    "Write about {title}, the {genre} set in {place}.",
    "Summarise {title} from {year} for a newspaper.",
    "Please review a {genre} called {title}.",
    "Should I see {title} or stay at home?",
)
_REQUESTS: Final = (" Write {count} sentences.", " Use {count} sentences.", " Keep to {count} sentences.", "")
_OPENINGS: Final = (
    "{title} is a {film_adj} {kind_or_genre}.",
    "I would call {title} a {film_adj} and {film_adj} {kind_or_genre}.",
    "{title} follows a {role} who {plot} in {place}.",
    "I saw {title} {when} with {company}.",
    "{title} came out in {year} and runs for {length}.",
    "In {title}, {actor} plays a {role} who {plot}.",
    "{director} made {title} in {year}.",
    "I {felt} {title}.",
)
_OPINION_FORMS: Final = (
    "The {acting} felt {acting_adj} {when_in_film}.",
    "I {felt} the {story} and the {craft}.",
    "The {pace} seemed {pace_adj} and the {story} {does}.",
    "{actor} plays the {role} {manner}.",
    "The {story} turned {story_adj} {when_in_film}.",
    "The {craft} looked {craft_adj} and the {acting} sounded {acting_adj}.",
    "{director} directs {manner} and the {craft} {does}.",
    "{actor} {does} as the {role}.",
    "What a {film_adj} {kind_or_genre}!",
)
_CONTRAST_FORMS: Final = (
    "The {~story} seemed {~story_adj}, but the {acting} felt {acting_adj}.",
    "Although the {~craft} looked {~craft_adj}, I {felt} the {story}.",
    "{actor} {~does}, while the {story} {does}.",
    "The {~pace} felt {~pace_adj}, yet the {craft} {does}.",
)
_NEUTRAL_FORMS: Final = (
    "It follows a {role} who {plot} in {place}.",
    "{actor} plays a {role} and {other} plays a {role}.",
    "The {kind_or_genre} came out in {year} and runs for {length}.",
    "{director} wrote it with {other}.",
    "Most scenes take place in {place}.",
    "Later the {role} {plot}.",
)
_CLOSINGS: Final = (
    "For me it was a {verdict}.",
    "It left me {viewer_adj}.",
    "Overall, {title} is a {verdict}.",
    "In the end, it {does}.",
    "{company} {felt} it.",
    "Overall, a {film_adj} {kind_or_genre}.",
)

_FORM_KINDS: Final = ((_OPINION_FORMS, 0.5), (_CONTRAST_FORMS, 0.25), (_NEUTRAL_FORMS, 0.25))
_LENGTHS: Final = (("two", 0.27), ("three", 0.4), ("four", 0.25), ("five", 0.08))
_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five")
# The share of positive opinions in a positive, a mixed and a negative review; a hair more negative than positive ones.
_LEANINGS: Final = ((0.9, 0.38), (0.5, 0.2), (0.1, 0.42))

SENTIMENT: Final[dict[str, float]] = {
    word: score
    for levels in _OPINIONS.values()
    for score, words in zip(_SCORES, levels, strict=True)
    for word in words.split()
}
"""Every opinion word of the grammar and its sentiment: -1, -0.5, 0.5 or 1."""


def gold_reward(text: str) -> float:
    """Mean sentiment of the opinion words of `text`, in [-1, 1]; 0 where there is none."""
    scores = [SENTIMENT[word] for word in re.findall(r"[a-z]+", text.lower()) if word in SENTIMENT]
    return sum(scores) / len(scores) if scores else 0.0


def gold_rewards(texts: Iterable[str]) -> list[float]:
    """`gold_reward` of each text."""
    return [gold_reward(text) for text in texts]


def generate(seed: int, n: int) -> list[dict[str, str]]:
    """`n` prompts with a review each, as {"prompt", "response"}; the same ones for the same seed on every machine."""
    rng = Random(seed)
    return [_example(rng) for _ in range(n)]


def _pick(rng: Random, items: Sequence[_T]) -> _T:
    # Of `Random`, only `random()` is promised to give the same numbers in every version of Python.
    return items[int(rng.random() * len(items))]


def _weighted(rng: Random, items: Sequence[tuple[_T, float]]) -> _T:
    left = rng.random() * sum(weight for _, weight in items)
    for item, weight in items:
        left -= weight
        if left < 0:
            return item
    return items[-1][0]


def _words(listed: str) -> list[str]:
    return listed.split("|") if "|" in listed else listed.split()


def _name(rng: Random) -> str:
    return f"{_pick(rng, _words(_FIRST))} {_pick(rng, _words(_LAST))}"


def _example(rng: Random) -> dict[str, str]:
    known = {
        "title": f"The {_pick(rng, _words(_TITLE_ADJ))} {_pick(rng, _words(_TITLE_NOUN))}",
        "genre": _pick(rng, _words(_FACTS["genre"])),
        "year": str(1950 + int(rng.random() * 70)),
        "director": _name(rng),
        "actor": _name(rng),
        "place": _pick(rng, _words(_FACTS["place"])),
    }
    count = _weighted(rng, _LENGTHS)
    prompt = _finish(_pick(rng, _PROMPTS).format_map(known)) + _pick(rng, _REQUESTS).format(count=count)
    return {"prompt": prompt, "response": _Review(rng, known).text(_NUMBERS.index(count))}


class _Review:
    """One review in the making: what is known of the film, its leaning, and the words it has used."""

    def __init__(self, rng: Random, known: dict[str, str]) -> None:
        self.rng = rng
        self.known = known | {"other": _name(rng), "company": _pick(rng, _words(_FACTS["company"]))}
        self.positive = _weighted(rng, _LEANINGS)
        self.used: set[str] = set()

    def text(self, sentences: int) -> str:
        forms = [self._unused(_OPENINGS)]
        while len(forms) < sentences - 1:
            forms.append(self._unused(_weighted(self.rng, _FORM_KINDS)))
        forms.append(self._unused(_CLOSINGS))
        return " ".join(self._sentence(form) for form in forms)

    def _unused(self, items: Sequence[str]) -> str:
        item = _pick(self.rng, [item for item in items if item not in self.used] or items)
        self.used.add(item)
        return item

    def _sentence(self, form: str) -> str:
        return _finish(re.sub(r"\{(~?)(\w+)\}", lambda slot: self._fill(slot[2], against=slot[1] == "~"), form))

    def _fill(self, slot: str, against: bool) -> str:
        if slot in _OPINIONS:
            positive = (self.rng.random() < self.positive) != against
            strong = self.rng.random() < 0.5
            level = (0 if strong else 1) if positive else (3 if strong else 2)
            return self._unused(_words(_OPINIONS[slot][level]))
        if slot == "kind_or_genre":
            slot = "kind" if self.rng.random() < 0.5 else "genre"
        if slot in self.known:
            return self.known[slot]
        return self._unused(_words(_FACTS[slot]))


def _finish(sentence: str) -> str:
    sentence = re.sub(r"\ba (?=[aeiou])", "an ", sentence)
    return sentence[0].upper() + sentence[1:]
