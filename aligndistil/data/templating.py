"""The chat template: conversations -> text, and whether what a row says stands in that text."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from datetime import date
from textwrap import shorten
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from aligndistil.data.records import Messages, Unusable, common_prefix
from aligndistil.errors import UserError

FIXED_DATE = date(2024, 7, 26)
"""Today, for a template that writes the date: the day that Llama 3's template names where it knows no other."""

MARKED = "the text holds a marker of the chat template"
REPEATED = "the answer begins with the text of the prompt"
LEFT_OUT = "the chat template leaves out"
THINKS_TWICE = "the chat template opens <think>, and the answer opens it again"
THINKS_ON = (
    "the chat template opens <think> in the prompt, and the answer has no </think>: give the answers with their "
    "reasoning, or turn thinking off with model.chat_template_kwargs, if the template can"
)
THINKS_ANYWAY = "the chat template turns thinking off in the prompt, and the answer has reasoning"
EMPTY_THOUGHT = "the chat template writes an empty <think></think> into the response, and not into the prompt"
TEMPLATE_REASONS = (MARKED, REPEATED, LEFT_OUT, THINKS_TWICE, THINKS_ON, THINKS_ANYWAY, EMPTY_THOUGHT)
"""How the reasons begin for which a row is not what the user wrote, once it has been through the template."""

SAID = 200
"""Characters of what a template says when it refuses."""
_WORD = "aligndistil"
_DATE_CODES = ("-d", "-m", "-j", *"aAbBcdeDFGgHIjmMpSTuUVwWxXyYZ")
_BRACKETED = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_THINK_TAG = re.compile(r"\s*(</?think>)\s*")
_THOUGHT = re.compile(r"<think>\s*(?!\s|</think>)")
_NO_THOUGHT = r"\s*(?:<think>)?\s*</think>"
_SWITCHES = ("enable_thinking", "thinking")
"""Names under which templates let thinking be turned off."""


class ChatTemplate:
    """A tokenizer's chat template with the recipe's arguments.

    Raises UserError when the template does not parse, or an argument is one it cannot be given or does not read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs)
        self._text = str(tokenizer.chat_template)
        self._refuse_kwargs()
        question, answer = {"role": "user", "content": _WORD}, {"role": "assistant", "content": _WORD}
        system = {"role": "system", "content": _WORD}
        asked, prompt = self._probe(question), self._probe(question, answered=False)
        whole = self._probe(question, answer)
        self.opening = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        """What the template writes to have an answer begun."""
        frame = " ".join([prompt, whole, self._probe(system, question)]).replace(_WORD, " ")
        self._marker = _any_of(self._markers(frame))
        self._switch, on = self._find_switch(prompt, question)
        self._thinks = on or self._opens or self._adds_empty_thought(whole, prompt, _WORD)

    def mode(self) -> str | None:
        """Whether the model is asked to think, and what decides it; None for a template that knows no thinking."""
        if self._switch or self._thinks or self._closes:
            given = [f"{name}: {json.dumps(value)}" for name, value in self._kwargs.items() if "think" in name]
            decided = ", ".join(given) or "the chat template's default"
            return f"thinking: {'on' if self._thinks else 'off'} ({decided})"
        return None

    def render(self, messages: Messages, tools: Iterable[Mapping[str, Any]] | None, *, answered: bool) -> str:
        """The conversation as text, up to the answer's beginning unless it is `answered`.

        Raises Unusable when the template refuses the conversation.
        """
        objects = [_for_template(turn) for turn in messages]
        try:
            return self._render(objects, tools, answered, self._kwargs)
        except Unusable:
            if objects == messages:
                raise
            return self._render(messages, tools, answered, self._kwargs)  # DeepSeek's reads arguments as JSON

    def prompt(self, messages: Messages, tools: Iterable[Mapping[str, Any]] | None) -> str:
        """The prompt as text. Raises Unusable when it was templated already, or the template leaves out part of it."""
        if not messages:
            raise Unusable("empty prompt")
        for turn in messages:
            self._refuse_marked(_content(turn))
        closing = self.opening.strip()
        if closing and _content(messages[-1]).rstrip().endswith(closing):
            raise Unusable(_marked(closing))
        text = self.render(messages, tools, answered=False)
        for turn in messages:
            # Templates leave out the reasoning of earlier answers, as the model was trained to read them.
            content = _content(turn).rsplit("</think>")[-1] if turn["role"] == "assistant" else _content(turn)
            _refuse_missing(content, text, f"the content of a turn of {turn['role']}")
        if tools and self._same(messages, None, text, answered=False):
            raise Unusable(f"{LEFT_OUT} the tools")
        bare = [_without_calls(turn) for turn in messages]
        if bare != messages and self._same(bare, tools, text, answered=False):
            raise Unusable(f"{LEFT_OUT} the tool_calls")
        return text

    def whole(
        self, messages: Messages, answer: dict[str, Any], tools: Iterable[Mapping[str, Any]] | None, prompt: str
    ) -> str:
        """The conversation with its answer, where `prompt` is its text without.

        Raises Unusable when the answer was templated already, the template leaves out part of it, or it thinks where
        the prompt does not, or the other way round.
        """
        content = _content(answer)
        if self._marker.search(content):  # a stop token at its end is no harm: there will be one
            self._refuse_marked(re.sub(rf"(?:{self._marker.pattern}|\s)+$", "", content))
        text = self.render([*messages, answer], tools, answered=True)
        continues = text.startswith(prompt)
        # An answer may say a <think> that the prompt has opened, and may not continue the prompt at all.
        tail = text[len(prompt) if continues and not self._opens else self._begin(text, prompt) :]
        _refuse_missing(content, tail, "part of the answer")
        for name in ("reasoning_content", "reasoning", "thinking"):
            _refuse_missing(str(answer.get(name) or ""), tail, f"the {name} of the answer")
        if answer.get("tool_calls") and self._same([*messages, _without_calls(answer)], tools, text, answered=True):
            raise Unusable(f"{LEFT_OUT} the tool_calls of the answer")
        if self._opens and continues and text[len(prompt) :].lstrip().startswith("<think>"):
            raise Unusable(THINKS_TWICE)
        if self._opens and continues and "</think>" not in tail:
            raise Unusable(THINKS_ON)
        if self._closes and not continues and _THOUGHT.search(tail):
            raise Unusable(THINKS_ANYWAY)
        if self._adds_empty_thought(text, prompt, content):
            off = f"set model.chat_template_kwargs: {{{self._switch}: false}}"
            remedy = off if self._switch else "give the answers with their reasoning"
            raise Unusable(f"{EMPTY_THOUGHT}, so that it would be trained: {remedy}")
        return text

    def _begin(self, whole: str, prompt: str) -> int:
        """Where the turn of the answer begins."""
        return max(0, min(common_prefix(prompt, whole), len(prompt) - len(self.opening)))

    def _adds_empty_thought(self, whole: str, prompt: str, answer: str) -> bool:
        """Whether an empty thought opens the answer's turn that is neither the prompt's nor the answer's own."""
        header = re.escape(re.split("</?think>", self.opening)[0].rstrip())
        thought = re.compile(rf"{header}{_NO_THOUGHT}").match(whole, self._begin(whole, prompt))
        inside = thought is not None and whole.startswith(prompt) and thought.end() <= len(prompt)
        return thought is not None and not inside and not re.match(_NO_THOUGHT, answer)

    def _find_switch(self, prompt: str, question: dict[str, Any]) -> tuple[str | None, bool]:
        """The argument that turns thinking off, None without one, and whether it is on."""
        for name in _SWITCHES:
            off, on = (self._probe(question, answered=False, **{name: value}) for value in (False, True))
            if off != on:
                return name, prompt != off
        return None, False

    @property
    def _opens(self) -> bool:
        return self.opening.rstrip().endswith("<think>")

    @property
    def _closes(self) -> bool:
        return self.opening.rstrip().endswith("</think>")

    def _refuse_kwargs(self) -> None:
        ours = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters} - {"documents"}
        for name in self._kwargs:
            if name in ours:
                raise UserError(f"model.chat_template_kwargs: {name!r} comes from the rows, or is not for a template")
            if not re.search(rf"\b{re.escape(name)}\b", self._text):
                raise UserError(f"model.chat_template_kwargs: the chat template does not read {name!r}; take it out")

    def _markers(self, frame: str) -> set[str]:
        """What the template writes around the words of a conversation, special tokens or not."""
        added = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        special = {token.strip() for token in added | set(self._tokenizer.all_special_tokens)} - {""}
        return ({token for token in special if token in frame} | set(_BRACKETED.findall(frame))) - {
            "<think>",
            "</think>",
        }

    def _refuse_marked(self, text: str) -> None:
        if found := self._marker.search(text):
            raise Unusable(_marked(found[0]))

    def _same(
        self, messages: Messages, tools: Iterable[Mapping[str, Any]] | None, text: str, *, answered: bool
    ) -> bool:
        try:
            return self.render(messages, tools, answered=answered) == text
        except Unusable:
            return False

    def _probe(self, *messages: dict[str, Any], answered: bool = True, **kwargs: Any) -> str:
        """A conversation of single words, or nothing when the template refuses it."""
        try:
            return self._render(list(messages), None, answered, {**self._kwargs, **kwargs})
        except Unusable:
            return ""

    def _render(
        self,
        messages: Messages,
        tools: Iterable[Mapping[str, Any]] | None,
        answered: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        given: list[Any] | None = [dict(tool) for tool in tools or ()] or None
        try:
            text = self._tokenizer.apply_chat_template(
                cast(Any, messages),
                tools=given,
                chat_template=_on_fixed_date(self._tokenizer.get_chat_template(None, given)),
                tokenize=False,
                add_generation_prompt=not answered,
                **kwargs,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        # What a template does with a conversation that it was not written for: `'...' + message.content` of a number.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            said = shorten(str(error), SAID, placeholder=" ...")
            raise Unusable(f"the chat template refuses the conversation: {said}") from error
        return cast(str, text)


def repeats(prompt: str | Messages, answer: str | dict[str, Any]) -> bool:
    """Whether the answer begins with a prompt that is text. Short ones may be there by chance.

    Answers to messages may: where the turns are told apart, it is somebody who restates the question.
    """
    said = answer if isinstance(answer, str) else _content(answer)
    return isinstance(prompt, str) and len(prompt.strip()) >= 20 and said.lstrip().startswith(prompt.strip())


def _on_fixed_date(template: str) -> str:
    """The template with a `strftime_now` of its own: transformers passes no function to templates, and knows today."""
    if "strftime_now" not in template:
        return template
    codes = "".join(f"|replace('%{code}', '{FIXED_DATE.strftime(f'%{code}')}')" for code in _DATE_CODES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def _for_template(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn as templates read it: tool calls with their arguments as objects, not JSON, and a content beside."""
    if not turn.get("tool_calls"):
        return turn
    return {**turn, "content": _content(turn), "tool_calls": [_with_object(call) for call in turn["tool_calls"]]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def _without_calls(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name != "tool_calls"}


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else ""


def _refuse_missing(part: str, text: str, what: str) -> None:
    """Raise Unusable when the part does not stand in the text, as it is or as JSON, which tools' answers may become."""
    if part.strip() in text:
        return
    # Templates that know reasoning set its tags on lines of their own.
    part, text = (_THINK_TAG.sub(r"\1", one).strip() for one in (part, text))
    if part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
        raise Unusable(f"{LEFT_OUT} {what}")


def _marked(marker: str) -> str:
    return f"{MARKED}, {marker!r}"


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    # `(?!)` matches nothing.
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)")
