"""Raw rows -> records: a prompt and its responses, as text or messages, before any token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from aligndistil.batch import DataKind
from aligndistil.data.turns import (
    ANSWER_PARTS,
    Messages,
    Unusable,
    answer_of,
    read_history,
    read_messages,
    read_tools,
    said,
    turns_or_text,
)

__all__ = [
    "HH_ANSWER",
    "SAME",
    "SCORE_KEYS",
    "Messages",
    "Record",
    "Unusable",
    "common_prefix",
    "is_hh",
    "read_label",
    "to_records",
]

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_BEGIN = re.compile(r"(^\s*|\n\n)Human:")
HH_ANSWER = "\n\nAssistant:"
SAME = "chosen and rejected are the same"
LABELS = dict.fromkeys(("true", "1", "1.0"), True) | dict.fromkeys(("false", "0", "0.0", "-1", "-1.0"), False)
"""How a label is written, in lower case -> desirable or not."""
NUMBERED_ANSWER = re.compile(r"response_(\w+)")
ANSWER_KEYS = ("response", "content", "text", "answer", "completion", "output")
"""Where the text of an answer is that has a score beside it."""
SCORE_KEYS = ("score", "overall_score", "rating", "reward")
Answer = str | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One example before encoding."""

    prompt: str | Messages
    responses: tuple[Answer, ...]
    """None for PROMPTS, (chosen, rejected) for PAIRS, else one. Text, or the assistant's message if it says more."""
    label: bool = True
    """Desirable or not; only UNPAIRED data reads it."""
    tools: list[dict[str, Any]] | None = None
    """What the chat template is told of the tools that may be called."""
    templated: bool = False
    """The text is final: it has been through a chat template."""


def to_records(
    row: Mapping[str, Any],
    layout: str,
    kind: DataKind,
    *,
    reverse: bool = False,
    chat: bool = True,
    templated: bool = False,
) -> list[Record]:
    """What a raw row (our column names, see `formats`) gives to an objective whose data are `kind`.

    Usually one record; a pair gives two to UNPAIRED, and an undesirable row none to RESPONSES. `reverse` swaps chosen
    and rejected, or the label. HH strings become messages when `chat`, and else stay the plain text they are, as does
    all text that is `templated`.

    Raises Unusable with the reason when the row has to be dropped.
    """
    if layout == "hh":
        records = _from_pair(*_read_hh(row, chat and not templated), kind, reverse)
    elif layout == "preference":
        records = _from_pair(*_read_pair(row, kind), kind, reverse)
    elif layout == "unpaired":
        records = _from_unpaired(row, kind, reverse)
    elif layout == "demonstrations":
        prompt, response = _read_answered(row)
        records = [Record(prompt, () if kind is DataKind.PROMPTS else (response,))]
    else:
        records = [Record(_read_prompt(_prompt_of(row)), ())]
    tools = read_tools(row.get("tools"))
    if chat and not templated:
        records = [_unwrap_hh(record) for record in records]
    return [_complete(record, row, tools, templated) for record in records]


def is_hh(row: Mapping[str, Any]) -> bool:
    """Whether `chosen`, or `prompt` and `chosen` together, are a conversation as HH-RLHF writes it."""
    prompt, text = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, str) and isinstance(text, str) and prompt.rstrip().endswith(HH_ANSWER):
        text = prompt
    return isinstance(text, str) and HH_BEGIN.search(text) is not None and HH_ANSWER in text


def read_label(value: Any) -> bool:
    """Desirable or not. Raises Unusable when the value is no label."""
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise Unusable("the label is none of true, false, 1, 0, -1")
    return label


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences of one type begin with alike."""
    if right[: len(left)] == left:
        return len(left)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """The prompt column, and after a blank line the `input` column, which says what the instruction is about."""
    prompt, about = row.get("prompt"), row.get("input")
    if about is None or about == "":
        return prompt
    if not isinstance(prompt, str) or not isinstance(about, str):
        raise Unusable("prompt and input are not both text")
    return f"{prompt}\n\n{about}" if about.strip() else prompt


def _read_prompt(value: Any) -> str | Messages:
    value = turns_or_text(value)
    if isinstance(value, str):
        return value
    if value is None:
        raise Unusable("no prompt")
    messages = read_messages(value)
    if messages and messages[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's turn")
    return messages


def _split_conversation(value: Any, prompt: Any) -> tuple[str | Messages, Answer]:
    """The prompt and the last turn of a conversation, which may be that last turn alone when `prompt` is given."""
    conversation = read_messages(value)
    if not conversation or conversation[-1]["role"] != "assistant":
        raise Unusable("the conversation does not end with the assistant's turn")
    opening, response = conversation[:-1], answer_of(conversation[-1])
    if not opening:
        return _read_prompt(prompt), response
    if prompt is not None and not _opens(prompt, opening):
        raise Unusable("the prompt is not the opening of the conversation")
    return _read_prompt(opening), response


def _opens(prompt: Any, opening: Messages) -> bool:
    prompt = turns_or_text(prompt)
    if isinstance(prompt, str):
        return any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in opening)
    messages = read_messages(prompt)
    return said(opening[: len(messages)]) == said(messages)


def _read_response(value: Any, prompt: Any) -> tuple[str | Messages, Answer]:
    value = turns_or_text(value)
    if isinstance(value, str):
        return _read_prompt(prompt), value
    return _split_conversation(value, prompt)


def _read_pair(row: Mapping[str, Any], kind: DataKind) -> tuple[str | Messages, Answer, Answer]:
    answers = _answers(row)
    if answers:
        prompt, pair = _prompt_of(row), _rank(row, answers, kind)
    elif "chosen" not in row and row.get("messages") is not None:
        # The conversation ends with the chosen answer, and the rejected one has a column of its own.
        prompt, answer = _split_conversation(row["messages"], None)
        pair = [{"role": "assistant", "content": answer} if isinstance(answer, str) else answer], row.get("rejected")
    else:
        prompt, pair = _prompt_of(row), (row.get("chosen"), row.get("rejected"))
    chosen, rejected = map(turns_or_text, pair)
    if chosen is None or rejected is None:
        raise Unusable("chosen or rejected is missing")
    if "chosen" in row and isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable("one of chosen and rejected is a string, the other messages")
    if prompt is None and not (isinstance(chosen, list) and len(chosen) > 1):
        prompt = row.get("messages")
    if "chosen" in row and prompt is None and isinstance(chosen, str):
        if "prompt" in row:  # of a source with prompts, this row has none
            raise Unusable("no prompt")
        return _read_shared(chosen, rejected)
    chosen_prompt, chosen_answer = _read_response(chosen, prompt)
    rejected_prompt, rejected_answer = _read_response(rejected, prompt)
    if not _same_prompt(chosen_prompt, rejected_prompt):
        raise Unusable("chosen and rejected do not share their prompt")
    return chosen_prompt, chosen_answer, rejected_answer


def _same_prompt(left: str | Messages, right: str | Messages) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    return said(left) == said(right)


def _read_shared(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common opening of two strings, cut at its last line break, or else at its last space, and what follows it.

    Two answers often begin alike, and their first words are not the prompt's.
    """
    if is_hh({"chosen": chosen}):
        raise Unusable("chosen is an HH string, and most rows are not")
    shared = chosen[: common_prefix(chosen, rejected)]
    end = (shared.rfind("\n") + 1) or (shared.rfind(" ") + 1)
    return chosen[:end], chosen[end:], rejected[end:]


def _answers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answers to rank, by their number or letter; none in a row of another layout."""
    if "chosen" in row:
        return {}
    if row.get("responses") is not None:
        if not isinstance(row["responses"], list):
            raise Unusable("responses is not a list")
        return {str(number): answer for number, answer in enumerate(row["responses"])}
    numbered = ((NUMBERED_ANSWER.fullmatch(name), answer) for name, answer in row.items())
    return {name[1]: answer for name, answer in numbered if name is not None and answer is not None}


def _rank(row: Mapping[str, Any], answers: dict[str, Any], kind: DataKind) -> tuple[Any, Any]:
    """The best and the worst answer, by `preferred` or else by the scores. Only the prompt needs no best."""
    if len(answers) < 2:
        raise Unusable("there are fewer than two answers")
    best, *_, worst = answers
    if kind is not DataKind.PROMPTS:
        best, worst = _by_preference(row["preferred"], answers) if "preferred" in row else _by_score(row, answers)
    return _text_of(answers[best]), _text_of(answers[worst])


def _by_preference(preferred: Any, answers: dict[str, Any]) -> tuple[str, str]:
    name = re.sub(r"^(\d+)\.0$", r"\1", str(preferred).strip()).lower()
    if name.startswith("tie"):
        raise Unusable("the answers are tied")
    best = name.rpartition("_")[2]  # of model_a, or of response_1
    if best not in answers or len(answers) != 2:
        raise Unusable(f"preferred {preferred!r} does not choose one of two answers ({', '.join(answers)})")
    return best, next(other for other in answers if other != best)


def _by_score(row: Mapping[str, Any], answers: dict[str, Any]) -> tuple[str, str]:
    listed = row.get("scores")
    if listed is not None and (not isinstance(listed, list) or len(listed) != len(answers)):
        raise Unusable("scores and responses are not lists of one length")
    scores = {}
    for number, (name, answer) in enumerate(answers.items()):
        inside = answer if isinstance(answer, Mapping) else {}
        within = next((inside[key] for key in SCORE_KEYS if inside.get(key) is not None), None)
        scores[name] = _number(listed[number] if listed is not None else row.get(f"score_{name}", within))
    best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    if scores[best] == scores[worst]:
        raise Unusable("the answers have the same score")
    return best, worst


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable("a score is not a number")
    return number


def _text_of(answer: Any) -> Any:
    """An answer without the score beside it."""
    if not isinstance(answer, Mapping) or answer.get("role") is not None or answer.get("from") is not None:
        return answer
    text = next((answer[key] for key in ANSWER_KEYS if answer.get(key) is not None), None)
    if text is None:
        raise Unusable(f"an answer has none of the keys {', '.join(ANSWER_KEYS)}; it has {', '.join(answer)}")
    return text


def _read_hh(row: Mapping[str, Any], chat: bool) -> tuple[str | Messages, str, str]:
    """HH-RLHF strings: whole conversations, or continuations of a `prompt` column. Split at the last answer."""
    opening = row.get("prompt") or ""
    texts = []
    for text in (row.get("chosen"), row.get("rejected")):
        if not isinstance(text, str) or not isinstance(opening, str):
            raise Unusable("chosen or rejected is not an HH string")
        texts.append(text if text.startswith(opening) else opening + text)
    chosen_prompt, chosen = _split_hh(texts[0])
    rejected_prompt, rejected = _split_hh(texts[1])
    if chosen_prompt != rejected_prompt:
        raise Unusable("chosen and rejected do not share their prompt")
    if not chat:
        return chosen_prompt + HH_ANSWER, chosen, rejected
    return _hh_messages(chosen_prompt), chosen.strip(), rejected.strip()


def _split_hh(text: str) -> tuple[str, str]:
    prompt, answer, response = text.rpartition(HH_ANSWER)
    if not answer or HH_TURN.search(response):
        raise Unusable("the conversation does not end with the assistant's turn")
    return prompt, response


def _hh_messages(text: str) -> Messages:
    before, *turns = HH_TURN.split(text)
    if before.strip():
        raise Unusable("there is text before the first turn of the conversation")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def _unwrap_hh(record: Record) -> Record:
    """The record with turns, where its prompt is a text that HH-RLHF's names of speakers make a conversation of."""
    prompt = record.prompt
    if not isinstance(prompt, str) or not prompt.rstrip().endswith(HH_ANSWER) or not HH_BEGIN.match(prompt):
        return record
    responses = tuple(one.strip() if isinstance(one, str) else one for one in record.responses)
    return replace(record, prompt=_hh_messages(prompt.rstrip().removesuffix(HH_ANSWER)), responses=responses)


def _read_answered(row: Mapping[str, Any]) -> tuple[str | Messages, Answer]:
    """A prompt with one response: a conversation that ends with it, or a completion."""
    if row.get("messages") is not None:
        return _split_conversation(row["messages"], None)
    if row.get("completion") is None:
        raise Unusable("completion is missing")
    return _read_response(row["completion"], _prompt_of(row))


def _from_pair(prompt: str | Messages, chosen: Answer, rejected: Answer, kind: DataKind, reverse: bool) -> list[Record]:
    best, worst = (rejected, chosen) if reverse else (chosen, rejected)
    if kind is DataKind.PROMPTS:
        return [Record(prompt, ())]
    if kind is DataKind.RESPONSES:
        return [Record(prompt, (best,))]
    if best == worst:
        raise Unusable(SAME)
    if kind is DataKind.PAIRS:
        return [Record(prompt, (best, worst))]
    return [Record(prompt, (best,), label=True), Record(prompt, (worst,), label=False)]


def _from_unpaired(row: Mapping[str, Any], kind: DataKind, reverse: bool) -> list[Record]:
    desirable = read_label(row.get("label")) != reverse
    prompt, response = _read_answered(row)
    if kind is DataKind.PROMPTS:
        return [Record(prompt, ())]
    if kind is DataKind.RESPONSES:
        return [Record(prompt, (response,))] if desirable else []
    return [Record(prompt, (response,), label=desirable)]


def _complete(record: Record, row: Mapping[str, Any], tools: list[dict[str, Any]] | None, templated: bool) -> Record:
    """The record with what other columns say of its prompt.

    Raises Unusable when the record is empty, or not text although its text is said to be final.
    """
    _refuse_empty(record)
    system, history = row.get("system"), read_history(row.get("history") or [])
    if system is not None and not isinstance(system, str):
        raise Unusable("system is not text")
    prompt = record.prompt
    if (system and system.strip()) or history:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = _after(system or "", history, turns)
    if templated and not all(isinstance(text, str) for text in (prompt, *record.responses)):
        raise Unusable("`templated` says that the text is final, and the row holds messages")
    return replace(record, prompt=prompt, tools=tools, templated=templated)


def _after(system: str, history: Messages, turns: Messages) -> Messages:
    """A conversation after its system turn and earlier turns, neither of which is said twice."""
    own = turns[: bool(turns and turns[0]["role"] == "system")]
    rest = turns[len(own) :]
    if history and history[-1]["role"] == "user":
        if said(history[-1:]) != said(rest[:1]):
            raise Unusable("history ends with a turn of the user, who speaks next")
        history = history[:-1]
    earlier = history if said(rest[: len(history)]) != said(history) else []
    whole = [*own, *earlier, *rest]
    if not system.strip():
        return whole
    if whole[0]["role"] != "system":
        return [{"role": "system", "content": system}, *whole]
    if whole[0]["content"].strip() != system.strip():
        raise Unusable("system is not the system turn that the conversation has")
    return whole


def _refuse_empty(record: Record) -> None:
    if isinstance(record.prompt, str):
        asked = bool(record.prompt.strip())
    else:
        asked = any(turn["content"].strip() or turn.get("tool_calls") for turn in record.prompt)
    if not asked:
        raise Unusable("empty prompt")
    for response in record.responses:
        if isinstance(response, str):
            empty = not response.strip()
        else:
            empty = not response["content"].strip() and not any(response.get(part) for part in ANSWER_PARTS)
        if empty:
            raise Unusable("empty response")
