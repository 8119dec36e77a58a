"""Conversations as rows have them -> turns with our roles, and with every key that is not null."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, Any]]
"""Turns: "role" (system, user, assistant, tool), "content" (text), and every other key that the row has."""
ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    # Most chat templates know no developer, and would leave out or refuse what it says.
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython"), "tool"),
}
"""The role of a turn in lower case -> ours."""
ANSWER_PARTS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""What an assistant says beside the content of its turn."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TEXT_PARTS = ("text", "input_text", "output_text", None)
_MAY_BE_JSON = re.compile(r"""\s*[\[{].*["'](role|from)["']""", re.DOTALL)
_BEGINS_AS_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")


class Unusable(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""


def turns_or_text(value: Any) -> Any:
    """`value`, but a conversation that was stored as text is parsed, and one message alone is a list of it.

    Raises Unusable when a text begins as a conversation does, and does not parse.
    """
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, str) or not _MAY_BE_JSON.match(value):
        return value
    parsed = parse_text(value)
    turns = [parsed] if isinstance(parsed, Mapping) else parsed
    if looks_like_turns(turns):
        return turns
    if parsed is None and _BEGINS_AS_TURNS.match(value):
        raise Unusable("a text begins like a conversation in JSON, and does not parse as one")
    return value


def looks_like_turns(value: Any) -> bool:
    """Whether this is a list of messages, one of which has a role that we know."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        return False
    roles = [turn.get("role") or turn.get("from") for turn in value]
    said = all(turn.keys() & {"content", "value", *ANSWER_PARTS} for turn in value)
    return said and any(isinstance(role, str) and role.lower() in ROLES for role in roles)


def parse_text(text: str) -> Any:
    """What a text says in JSON, or as a Python literal (so pandas writes lists to CSV); None when it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def read_messages(value: Any) -> Messages:
    """A conversation with our roles, from `role`/`content` or `from`/`value` turns, or from such turns as text.

    A list of text parts is joined, a `function_call` becomes a tool call, and null keys are left out.

    Raises Unusable when it is none, or holds something that is not text.
    """
    turns = turns_or_text(value)
    if not isinstance(turns, list):
        raise Unusable("a conversation is not a list of messages")
    return [_read_message(turn) for turn in turns]


def read_history(value: Any) -> Messages:
    """Earlier turns, from messages or from pairs of what the user said and what the assistant answered."""
    turns = turns_or_text(value)
    if isinstance(turns, str):
        turns = parse_text(turns) if turns.strip() else []
    if not isinstance(turns, list):
        raise Unusable("history is not a list of turns")
    if not all(isinstance(turn, list) for turn in turns):
        return read_messages(turns)
    if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in turns):
        raise Unusable("a turn of history is not a pair of texts")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)]


def read_tools(value: Any, name: str = "tools") -> list[dict[str, Any]] | None:
    """Descriptions or calls of tools, from a list, one mapping, or the JSON text of either; None for none."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "null")):
        return None
    tools = parse_text(value) if isinstance(value, str) else value
    listed = tools if isinstance(tools, list) else [tools]
    parsed = [parse_text(tool) if isinstance(tool, str) else tool for tool in listed]
    if not all(isinstance(tool, Mapping) for tool in parsed):
        raise Unusable(f"{name} is neither a list of mappings nor JSON text of one")
    return [_without_nulls(tool) for tool in parsed] or None


def answer_of(message: Mapping[str, Any]) -> str | dict[str, Any]:
    """What an assistant's turn says: its text, or the whole message if it says more than text."""
    if any(part in message for part in ANSWER_PARTS):
        return dict(message)
    text: str = message["content"]
    return text


def said(messages: Messages) -> list[list[Any]]:
    """What two conversations that are the same have alike: ids or dates of turns may differ."""
    return [[turn["role"], turn["content"], *(turn.get(part) for part in ANSWER_PARTS)] for turn in messages]


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Unusable("a message is not a mapping with role and content")
    # A key that other rows have is there with the value None, so absence cannot be asked with `in`.
    rest = {key: value for key, value in message.items() if value is not None}
    role = rest.pop("role", rest.pop("from", None))
    content = rest.pop("content", rest.pop("value", None))
    if role is None:
        raise Unusable(f"a message has no role; its keys are {', '.join(message)}")
    ours = ROLES.get(role.lower()) if isinstance(role, str) else None
    if ours is None:
        raise Unusable(f"unknown role {role!r}")
    if role.lower() == "function_call":
        content, rest["function_call"] = "", content
    if rest.keys() >= {"function_call", "tool_calls"}:
        raise Unusable("a message has function_call and tool_calls")
    if "function_call" in rest:
        rest["tool_calls"] = _read_calls(rest.pop("function_call"))
    elif "tool_calls" in rest:
        rest["tool_calls"] = read_tools(rest["tool_calls"], "tool_calls")
    if held := [key for key in rest if key in MEDIA and rest[key]]:
        raise Unusable(f"a message holds {held[0]}, and only text can be used")
    if rest:
        rest = {key: value for key, value in rest.items() if value or key not in ANSWER_PARTS}
    if isinstance(content, list):
        content = "".join(_read_part(part) for part in content)
    if content is None and any(part in rest for part in ANSWER_PARTS):
        content = ""
    if not isinstance(content, str):
        raise Unusable("the content of a message is not a string")
    return {"role": ours, "content": content, **rest}


def _read_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(text := part.get("text"), str):
        raise Unusable(f"a message has content of type {kind!r}, and only text can be used")
    return text


def _read_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls from one or more mappings of name and arguments, or from their JSON text."""
    parsed = parse_text(value) if isinstance(value, str) else value
    calls = [parsed] if isinstance(parsed, Mapping) else parsed
    if not isinstance(calls, list) or not all(isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls):
        raise Unusable("a function call is not JSON with name and arguments")
    return [{"type": "function", "function": _without_nulls(call)} for call in calls]


def _without_nulls(value: Any) -> Any:
    """Without the keys that only other rows have: a table gives every row the keys of all, with the value None."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
