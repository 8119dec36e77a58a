"""Judges that score: an exact reward, or a reward model. The answer with the higher score is the better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from aligndistil.batch import Row
from aligndistil.benchmarks.base import Benchmark
from aligndistil.data import Encoder, Record
from aligndistil.data.records import Unusable
from aligndistil.data.reviews import gold_rewards
from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel
from aligndistil.errors import UserError
from aligndistil.evaluation.rows import last_scores, read_rows
from aligndistil.judge import (
    Ask,
    Compared,
    EndpointJudge,
    Judge,
    JudgeConfig,
    Judged,
    Message,
    OnProgress,
    Usage,
    Verdict,
    VerdictCache,
    load_judge,
)
from aligndistil.models import check_scalar_model, config_of, load_scalar_model, load_tokenizer, model_hash, stop_ids
from aligndistil.recipe import Model
from aligndistil.run_folder import check_as_trained, section_of

Responses: TypeAlias = Sequence[tuple[Sequence[Message], str]]
"""Conversations that end with the user's turn, each with a response to it."""
Score: TypeAlias = Callable[[Responses], list[float]]


@dataclass(frozen=True, slots=True)
class ScoringJudge:
    """A judge that scores each answer by itself: the same verdict each time it is asked, and in either order."""

    name: str
    about: str
    key: str
    score: Score
    scores_only: bool = True

    def ask(
        self, asks: Sequence[Ask], repeats: int, what: str, on_progress: OnProgress = lambda done, usage: None
    ) -> Judged:
        """See `Judge`. Raises UserError when a question is not about two answers."""
        if unlike := [ask.key for ask in asks if ask.compared is None]:
            raise UserError(
                f"{what}: the judge {self.name} only says which of two answers is better, and this benchmark asks for "
                f"more ({unlike[0]}); give a judge behind an endpoint"
            )
        pairs = {ask.key: ask.compared for ask in asks if ask.compared is not None}
        shown = {key: [(_text(pair), pair.first), (_text(pair), pair.second)] for key, pair in pairs.items()}
        # The same answer stands in several questions, and is scored once.
        conversations = {_text(pair): pair.prompt for pair in pairs.values()}
        distinct = list(dict.fromkeys(one for both in shown.values() for one in both))
        scores = dict(
            zip(distinct, self.score([(conversations[text], answer) for text, answer in distinct]), strict=True)
        )
        verdicts: dict[str, Verdict] = {}
        texts: dict[str, str] = {}
        for ask in asks:
            first, second = (scores[one] for one in shown[ask.key])
            verdicts[ask.key] = ask.of_preference(1.0 if first > second else 0.0 if first < second else 0.5)
            texts[ask.key] = f"{first:.6g} and {second:.6g}"
        on_progress(len(asks) * repeats, Usage())
        return Judged([verdicts] * repeats, [texts] * repeats, {}, Usage())


def judge_config(given: str) -> JudgeConfig:
    """A file, the name of a judge that comes with the package, or the folder of a reward model, or of its stage.

    Raises UserError when it is none of these.
    """
    folder = Path(given)
    if (folder / "done.json").is_file():
        folder = folder / "final"
    return JudgeConfig(reward_model=str(folder), name=given) if folder.is_dir() else load_judge(given)


def check_judge(config: JudgeConfig, benchmarks: Iterable[type[Benchmark] | Benchmark]) -> None:
    """Refuse a judge that cannot judge one of the benchmarks, before anything is sampled for it."""
    for benchmark in benchmarks:
        if (config.gold or config.reward_model) and not benchmark.pairwise:
            raise UserError(
                f"the judge {config.name} only says which of two answers is better, and {benchmark.title} asks for "
                "ratings: give a judge behind an endpoint, or leave it out"
            )


def open_judge(config: JudgeConfig, processes: Processes, batch_size: int) -> Judge:
    """Who judges. Raises MissingError when a package or a key is missing."""
    if config.gold:
        return gold_judge()
    if config.reward_model is not None:
        check_as_trained(config.reward_model, model_hash)
        section = section_of(config.reward_model)
        return reward_model_judge(config.name, config.reward_model, section, processes, batch_size)
    return EndpointJudge(config, VerdictCache())


def gold_judge() -> ScoringJudge:
    """The gold reward of the embedded reviews, which is known exactly."""
    about = "the gold reward of builtin:reviews (the mean sentiment of the opinion words)"
    return ScoringJudge("gold", about, about, lambda responses: gold_rewards(answer for _, answer in responses))


def reward_model_judge(name: str, path: str, section: Model, processes: Processes, batch_size: int) -> ScoringJudge:
    """A model with a scalar head; `path` is its folder or Hub id. It is loaded when it is first asked.

    Raises UserError when it is not there, or is a language model.
    """
    check_scalar_model(path, section)

    def score(responses: Responses) -> list[float]:
        return reward_scores(path, section, responses, processes, batch_size)

    identity = model_hash(path)
    return ScoringJudge(name, f"the reward model {path} ({identity[:8]})", identity, score)


def reward_scores(
    path: str,
    section: Model,
    responses: Responses,
    processes: Processes,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The score at the last token of each response, in the reward model's own tokens and chat template.

    An empty response has no token to be scored at, and is worth less than any other.

    `on_progress` is told how many more are done. Raises UserError when a response cannot be read.
    """
    tokenizer = load_tokenizer(path, section)
    encoder = Encoder(
        tokenizer,
        stop_ids=stop_ids(path, section, tokenizer),
        max_prompt_length=UNCUT,
        max_response_length=UNCUT,
        template_kwargs=section.chat_template_kwargs,
        checked=False,
    )
    rows: dict[int, Row] = {}
    records = [Record([dict(turn) for turn in prompt], (response,)) for prompt, response in responses]
    if not encoder.chat:
        records = [Record(_plain(prompt), (response,)) for prompt, response in responses]
    for i, (record, encoded) in enumerate(zip(records, encoder.encode(records), strict=True)):
        if not isinstance(encoded, Unusable):
            rows[i] = encoded.rows[0]
        elif responses[i][1].strip():
            raise UserError(f"the reward model {path} cannot read an answer to {str(record.prompt)[:60]!r}: {encoded}")
    context = getattr(config_of(path, section).get_text_config(), "max_position_embeddings", None) or 2**31
    longest = max((len(row.prompt_ids) + len(row.response_ids) for row in rows.values()), default=0)
    if longest > context:
        raise UserError(
            f"the reward model {path} reads {context} tokens, and the longest prompt with its answer has {longest}: "
            "give --max-new-tokens, or another judge"
        )
    model = ScalarModel(on_device(load_scalar_model(path, section, trained=False), processes.device))
    found = read_rows(
        list(rows.values()),
        lambda batch: last_scores(model, batch),
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        device=processes.device,
        on_progress=on_progress,
    )
    if broken := sum(not math.isfinite(score) for (score,) in found):
        raise UserError(f"the reward model {path} gives {broken} of {len(found)} answers no finite score; try float32")
    scores = dict(zip(rows, found, strict=True))
    return [scores[i][0] if i in scores else -math.inf for i in range(len(records))]


UNCUT = 2**20
"""Nothing is cut: a reward model that cannot read a whole answer says so itself."""


def _text(pair: Compared) -> str:
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in pair.prompt)


def _plain(prompt: Sequence[Message]) -> str:
    """What a model without a chat template reads of a conversation of one turn."""
    if len(prompt) != 1:
        raise UserError("the prompts are conversations, and the reward model's tokenizer has no chat template")
    return prompt[0]["content"]
