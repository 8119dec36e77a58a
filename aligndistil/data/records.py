"""Raw rows -> records: a prompt and its responses, as text or messages, before any token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from aligndistil.batch import DataKind

Messages = list[dict[str, str]]
"""Turns with the keys "role" (system, user, assistant, tool) and "content"."""
ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"
SAME = "chosen and rejected are the same"


class Unusable(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True, slots=True)
class Record:
    """One example before encoding."""

    prompt: str | Messages
    responses: tuple[str, ...]
    """None for PROMPTS, (chosen, rejected) for PAIRS, else one."""
    label: bool = True
    """Desirable or not; only UNPAIRED data reads it."""


def to_records(
    row: Mapping[str, Any], layout: str, kind: DataKind, *, reverse: bool = False, chat: bool = True
) -> list[Record]:
    """What a raw row (our column names, see `formats`) gives to an objective whose data are `kind`.

    Usually one record; a pair gives two to UNPAIRED, and an undesirable row none to RESPONSES. `reverse` swaps chosen
    and rejected, or the label. HH strings become messages when `chat`, and else stay the plain text they are.

    Raises Unusable with the reason when the row has to be dropped.
    """
    if layout in ("preference", "hh"):
        prompt, chosen, rejected = _read_hh(row, chat) if layout == "hh" else _read_pair(row)
        records = _from_pair(prompt, (rejected, chosen) if reverse else (chosen, rejected), kind)
    elif layout == "unpaired":
        records = _from_unpaired(row, kind, reverse)
    elif layout == "demonstrations":
        prompt, response = _read_demonstration(row)
        records = [Record(prompt, () if kind is DataKind.PROMPTS else (response,))]
    else:
        records = [Record(_read_prompt(row.get("prompt")), ())]
    for record in records:
        _refuse_empty(record)
    return records


def read_messages(value: Any) -> Messages:
    """A conversation with our roles, from `role`/`content` or `from`/`value` turns. Other keys are ignored."""
    if not isinstance(value, list):
        raise Unusable("a conversation is not a list of messages")
    return [_read_message(message) for message in value]


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences of one type begin with alike."""
    if right[: len(left)] == left:
        return len(left)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _read_message(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise Unusable("a message is not a mapping with role and content")
    # A key that other rows have is there with the value None, so absence cannot be asked with `in`.
    role = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if not isinstance(role, str) or role not in ROLES:
        raise Unusable(f"unknown role {role!r}")
    if not isinstance(content, str):
        raise Unusable("the content of a message is not a string")
    return {"role": ROLES[role], "content": content}


def _read_prompt(value: Any) -> str | Messages:
    if isinstance(value, str):
        return value
    if value is None:
        raise Unusable("no prompt")
    messages = read_messages(value)
    if messages and messages[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's turn")
    return messages


def _split_conversation(value: Any, prompt: Any) -> tuple[str | Messages, str]:
    """The prompt and the last turn of a conversation, which may be that last turn alone when `prompt` is given."""
    conversation = read_messages(value)
    if not conversation or conversation[-1]["role"] != "assistant":
        raise Unusable("the conversation does not end with the assistant's turn")
    opening, response = conversation[:-1], conversation[-1]["content"]
    if not opening:
        return _read_prompt(prompt), response
    if prompt is not None and not _opens(prompt, opening):
        raise Unusable("the prompt is not the opening of the conversation")
    return _read_prompt(opening), response


def _opens(prompt: Any, opening: Messages) -> bool:
    if isinstance(prompt, str):
        return any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in opening)
    messages = read_messages(prompt)
    return opening[: len(messages)] == messages


def _read_response(value: Any, prompt: Any) -> tuple[str | Messages, str]:
    if isinstance(value, str):
        return _read_prompt(prompt), value
    return _split_conversation(value, prompt)


def _read_pair(row: Mapping[str, Any]) -> tuple[str | Messages, str, str]:
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if chosen is None or rejected is None:
        raise Unusable("chosen or rejected is missing")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable("one of chosen and rejected is a string, the other messages")
    if isinstance(chosen, str) and prompt is None:
        shared = _shared_text(chosen, rejected)
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    chosen_prompt, chosen = _read_response(chosen, prompt)
    rejected_prompt, rejected = _read_response(rejected, prompt)
    if chosen_prompt != rejected_prompt:
        raise Unusable("chosen and rejected do not share their prompt")
    return chosen_prompt, chosen, rejected


def _shared_text(chosen: str, rejected: str) -> str:
    """The common opening of two strings, cut at its last line break, or else at its last space.

    Two answers often begin alike, and their first words are not the prompt's.
    """
    shared = chosen[: common_prefix(chosen, rejected)]
    return shared[: (shared.rfind("\n") + 1) or (shared.rfind(" ") + 1)]


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


def _read_demonstration(row: Mapping[str, Any]) -> tuple[str | Messages, str]:
    if row.get("messages") is not None:
        return _split_conversation(row["messages"], None)
    if row.get("completion") is None:
        raise Unusable("completion is missing")
    return _read_response(row["completion"], row.get("prompt"))


def _from_pair(prompt: str | Messages, pair: tuple[str, str], kind: DataKind) -> list[Record]:
    if kind is DataKind.PROMPTS:
        return [Record(prompt, ())]
    if kind is DataKind.RESPONSES:
        return [Record(prompt, pair[:1])]
    if pair[0] == pair[1]:
        raise Unusable(SAME)
    if kind is DataKind.PAIRS:
        return [Record(prompt, pair)]
    return [Record(prompt, pair[:1], label=True), Record(prompt, pair[1:], label=False)]


def _from_unpaired(row: Mapping[str, Any], kind: DataKind, reverse: bool) -> list[Record]:
    label = row.get("label")
    if label not in (True, False):
        raise Unusable("label is not true or false")
    prompt, response = _read_response(row.get("completion"), row.get("prompt"))
    if kind is DataKind.PROMPTS:
        return [Record(prompt, ())]
    desirable = bool(label) != reverse
    if kind is DataKind.RESPONSES:
        return [Record(prompt, (response,))] if desirable else []
    return [Record(prompt, (response,), label=desirable)]


def _refuse_empty(record: Record) -> None:
    contents = [record.prompt] if isinstance(record.prompt, str) else [turn["content"] for turn in record.prompt]
    if not any(content.strip() for content in contents):
        raise Unusable("empty prompt")
    if not all(response.strip() for response in record.responses):
        raise Unusable("empty response")
