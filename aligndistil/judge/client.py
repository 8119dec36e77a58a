"""A judge behind an OpenAI-compatible endpoint: many questions at a time, each until it is answered or given up."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from aligndistil.errors import MissingError, ServiceError
from aligndistil.judge.asks import Ask, Judged, Message, OnProgress, Reply, Unreadable, Usage, Verdict
from aligndistil.judge.cache import VerdictCache
from aligndistil.judge.config import NO_KEY, JudgeConfig

FIRST_PAUSE = 1.0
"""Seconds before a question is asked the second time; each further pause is twice as long, and all are jittered."""
LONGEST_PAUSE = 60.0
"""Seconds, unless the server asks for more."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds that a server may ask to wait; what asks for more is not waited for."""
HOPELESS = 20
"""Questions that a judge refuses before any other reply; then it would refuse all."""
SEEDS = 1000
"""Seeds between two attempts at one question; those of its repeats lie in between."""

_REFUSALS_OF_ONE = (400, 413, 422)
"""The request is wrong, say too long: others may be right."""
_PASSING = (408, 409, 425, 429)
"""These, and all from 500, may go well the next time."""


class EndpointJudge:
    """Asks a model by chat completions. Every readable reply is in the cache before it counts.

    A request that fails (time-out, no connection, status 408, 409, 425, 429 or 5xx, no completion in the body) is sent
    again after a pause. A reply without a verdict is gone on from, once, where the question has a reminder; otherwise
    the question is asked anew after a pause, and, so that a deterministic server may say something else, with a seed of
    its own where it would be greedy or have had a seed anyway. Questions with one and the same request share its reply.
    """

    scores_only = False

    def __init__(self, config: JudgeConfig, cache: VerdictCache) -> None:
        """Raises MissingError when the key is not set, or a package is not installed."""
        try:
            import openai  # noqa: F401
        except ImportError:
            raise MissingError(
                'a judge behind an endpoint needs the package openai; run `pip install "aligndistil[eval]"`'
            ) from None
        config.api_key()
        self.config = config
        self.cache = cache
        self.name = config.name

    @property
    def about(self) -> str:
        """Name, model, host and what differs from the benchmark's decoding."""
        config = self.config
        model = f"{config.name} ({config.model} at {config.host})" if config.name != config.model else ""
        own = [f"{key} {value}" for key, value in config.decoding.model_dump(exclude_none=True).items()]
        own += [f"{key} {json.dumps(value, sort_keys=True)}" for key, value in config.extra_body.items()]
        decoding = f"decoding as the benchmark says, but {', '.join(own)}" if own else "decoding as the benchmark says"
        return f"{model or f'{config.model} at {config.host}'}, {decoding}"

    @property
    def key(self) -> str:
        """Everything in its file that changes a request."""
        config = self.config
        parts = config.base_url, config.model, config.decoding.model_dump(), config.extra_body, config.max_tokens_as
        return json.dumps(parts, sort_keys=True)

    def ask(
        self, asks: Sequence[Ask], repeats: int, what: str, on_progress: OnProgress = lambda done, usage: None
    ) -> Judged:
        """See `Judge`. All repeats of all questions are one pool; `on_progress` should return at once.

        Raises:
            ServiceError: the endpoint cannot be reached, is overloaded or fails for longer than the attempts of one
                question, refuses the key or every question, or gives no log-probabilities where they are asked for.
            UserError: the cache cannot be used.
        """
        try:
            return asyncio.run(_Pool(self.config, self.cache, asks, repeats, what, on_progress).judged())
        finally:
            self.cache.close()


class _Failed(Exception):
    """A request that may go well the next time; `wait` is how long the server asks to wait, in seconds."""

    def __init__(self, words: str, wait: float = 0.0) -> None:
        super().__init__(words)
        self.wait = wait


class _Refused(Exception):
    """A request that never goes well."""


class _GivenUp(Exception):
    """A question that stays without a verdict."""


class _Pool:
    """One call: every repeat of every question, and what has come of them so far."""

    def __init__(
        self,
        config: JudgeConfig,
        cache: VerdictCache,
        asks: Sequence[Ask],
        repeats: int,
        what: str,
        on_progress: OnProgress,
    ) -> None:
        self.config, self.cache, self.asks, self.repeats = config, cache, asks, repeats
        self.what, self.on_progress = what, on_progress
        self.verdicts: list[dict[str, Verdict]] = [{} for _ in range(repeats)]
        self.texts: list[dict[str, str]] = [{} for _ in range(repeats)]
        self.missing: list[dict[str, str]] = [{} for _ in range(repeats)]
        self.usage = Usage()
        self.done = 0
        self.refusals: list[str] = []
        self.answered = 0
        self.given_up = 0  # since the last answer
        self.jitter = random.Random()
        # Two questions may be one request (both orders of two equal answers, say): the second waits for the first.
        self.locks: dict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def judged(self) -> Judged:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        questions = iter([(ask, repeat) for repeat in range(self.repeats) for ask in self.asks])
        key, url = self.config.api_key(), self.config.base_url
        # A server of one's own is not behind the proxy that leads outside.
        own = DefaultAsyncHttpxClient(trust_env=False) if self.config.is_local else None
        client = AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=None, http_client=own)
        async with client as self.client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.config.concurrency):
                        group.create_task(self._work(questions))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
        if self.refusals and len(self.refusals) == self.done:
            raise self._stopped(f"refuses every question ({self.refusals[0]})")
        keys = [ask.key for ask in self.asks]  # their order, and not that in which the server was done with them
        reasons = {key: [why[key] for why in self.missing if key in why] for key in keys}
        return Judged(
            [{key: found[key] for key in keys if key in found} for found in self.verdicts],
            [{key: found[key] for key in keys if key in found} for found in self.texts],
            {key: "; ".join(why) for key, why in reasons.items() if why},
            self.usage,
        )

    async def _work(self, questions: Iterator[tuple[Ask, int]]) -> None:
        """What one of `concurrency` does: takes the next question until there is none."""
        for ask, repeat in questions:
            try:
                reply, verdict = await self._answer(ask, repeat)
                self.texts[repeat][ask.key] = reply.text
                self.verdicts[repeat][ask.key] = verdict
            except (_GivenUp, _Refused) as error:
                if isinstance(error, _Refused):
                    self.refusals.append(str(error))
                    if len(self.refusals) >= HOPELESS and len(self.refusals) > self.done:
                        raise self._stopped(f"refuses every question ({self.refusals[0]})") from None
                self.missing[repeat][ask.key] = f"repeat {repeat + 1}: {error}" if self.repeats > 1 else str(error)
            self.done += 1
            self.on_progress(self.done, self.usage)

    async def _answer(self, ask: Ask, repeat: int) -> tuple[Reply, Verdict]:
        """Reply and verdict, out of the cache or asked for. Raises _GivenUp, _Refused, and what ends the whole call."""
        whole = {"base_url": self.config.base_url, "request": self._request(ask, repeat), "reminder": ask.reminder}
        key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        async with self.locks[key, repeat]:
            found = self.cache.get(key, repeat)
            if found is not None:
                stored, tokens = found
                try:
                    verdict = ask.read(stored)
                except Unreadable:
                    pass  # by what reads it now: it is asked again, and the new reply takes its place
                else:
                    self.usage += Usage(cached=1, saved=self._dollars(tokens))
                    return stored, verdict
            return await self._judge(ask, repeat, key)

    def _request(self, ask: Ask, repeat: int, anew: int = 0) -> dict[str, Any]:
        """The body of a request; `anew` says how many times the question was asked before in other words or seeds."""
        own = self.config.decoding
        temperature = ask.temperature if own.temperature is None else own.temperature
        request: dict[str, Any] = {
            "model": self.config.model,
            "messages": [*ask.messages],
            "temperature": temperature,
            self.config.max_tokens_as: ask.max_tokens if own.max_tokens is None else own.max_tokens,
            "extra_body": self.config.extra_body,
        }
        if ask.top_logprobs:
            request |= {"logprobs": True, "top_logprobs": ask.top_logprobs}
        if own.top_p is not None:
            request["top_p"] = own.top_p
        if own.seed is not None or (anew and temperature == 0):
            request["seed"] = (own.seed or 0) + repeat + SEEDS * anew
        return request

    async def _judge(self, ask: Ask, repeat: int, key: str) -> tuple[Reply, Verdict]:
        """Ask until a reply can be read, as often as is allowed."""
        request, begun, anew, reminded = self._request(ask, repeat), "", 0, False
        failed, unreadable, wait = "", "", 0.0
        for attempt in range(self.config.attempts):
            if attempt:
                await asyncio.sleep(wait)
                self.usage += Usage(retries=1)
            wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * self.jitter.uniform(0.5, 1)
            text = ""
            try:
                sent, tokens = await self._send(request)
                text = sent.text
                reply, verdict = _read(ask, begun, sent)
            except _Failed as error:
                failed, wait = str(error), max(wait, error.wait)
                continue
            except _Refused:
                if not begun:  # what was gone on from may have become too long; the question itself was not
                    raise
            except Unreadable as error:
                unreadable = str(error)
                if text and ask.reminder and not reminded:
                    reminded, begun, wait = True, text, 0.0
                    turns: list[Message] = [
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": ask.reminder},
                    ]
                    request = {**request, "messages": [*request["messages"], *turns]}
                    continue
            else:
                self.cache.put(key, repeat, reply, tokens)
                self.answered += 1
                self.given_up = 0
                return reply, verdict
            anew, begun = anew + 1, ""
            request = self._request(ask, repeat, anew)
        times = f"{self.config.attempts} {'attempt' if self.config.attempts == 1 else 'attempts'}"
        if unreadable:
            raise _GivenUp(f"no verdict in {times}: {unreadable}")
        self.given_up += 1
        if self.answered and self.given_up == 1:  # it answers others: the fault may be this question's
            raise _GivenUp(f"no reply in {times}: {failed}")
        raise self._stopped(f"has not answered one question in {times} ({failed})")

    async def _send(self, request: Mapping[str, Any]) -> tuple[Reply, tuple[int, int]]:
        """One request: the reply, and tokens in and out.

        Raises _Failed, _Refused, Unreadable when there is no text in the reply, and ServiceError when there is no use
        in going on.
        """
        from openai import APIConnectionError, APIStatusError

        self.usage += Usage(requests=1)
        try:
            async with asyncio.timeout(self.config.timeout):
                answer = await self.client.chat.completions.with_raw_response.create(**request)
        except TimeoutError:
            raise _Failed(f"no reply within {self.config.timeout:g} s") from None
        except APIConnectionError as error:
            raise _Failed(self._said(str(error.__cause__ or "") or str(error))) from None
        except APIStatusError as error:
            raise self._of_status(
                error.status_code, error.body or error.response.text, error.response.headers
            ) from None
        try:
            body = json.loads(answer.content)
            usage = body.get("usage") or {}
            tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            choice = body["choices"][0] if body["choices"] else {}
            text, top = (choice.get("message") or {}).get("content"), _likeliest(choice)
        except (ValueError, KeyError, TypeError, AttributeError):
            sent = self._said(answer.content.decode(errors="replace"))
            raise _Failed(f"what it sends is no completion: {sent}") from None
        self.usage += Usage(input_tokens=tokens[0], output_tokens=tokens[1], dollars=self._dollars(tokens))
        if not isinstance(text, str):
            raise Unreadable("the reply has no text")
        text = _answered(text)
        if "top_logprobs" in request and text and not top:
            raise ServiceError(
                f"{self.what}: the judge {self.config.name} at {self.config.host} gives no log-probabilities, which "
                "this needs; use a server that has them, as vLLM does, or write `alpaca_eval: ranking` in the judge's "
                "file to have the text read instead"
            )
        return Reply(text, top), tokens

    def _dollars(self, tokens: tuple[int, int]) -> float:
        price = self.config.price
        return (tokens[0] * price.input + tokens[1] * price.output) / 1e6

    def _of_status(self, status: int, body: object, headers: Mapping[str, str]) -> Exception:
        """What a status that is no success means."""
        words = f"status {status}: {self._said(body)}"
        if status in _REFUSALS_OF_ONE:
            return _Refused(words)
        if status in _PASSING or status >= 500:
            wait = _retry_after(headers)
            if wait > LONGEST_RETRY_AFTER:
                return self._stopped(f"wants to be asked again in {wait:.0f} seconds ({words})")
            return _Failed(words, wait)
        if status in (401, 403):
            return self._stopped(f"refuses the key, which comes from the variable {self.config.key_env} ({words})")
        if status == 404:
            return self._stopped(f"is not there ({words}): check `base_url` and `model` in its file")
        return self._stopped(f"refuses to answer ({words})")

    def _said(self, body: object) -> str:
        """The server's own words, on one line and without the key, should it repeat it."""
        if isinstance(body, Mapping):
            body = body.get("message") or body.get("detail") or body
        key, words = self.config.api_key(), " ".join(str(body).split())
        words = words if key == NO_KEY else words.replace(key, "***")
        return words if len(words) <= 300 else f"{words[:300]}..."

    def _stopped(self, why: str) -> ServiceError:
        there = sum(map(len, self.verdicts))
        return ServiceError(
            f"{self.what}: the judge {self.config.name} at {self.config.host} {why}; {there} of "
            f"{len(self.asks) * self.repeats} verdicts are there, and the same command goes on from them"
        )


def _answered(text: str) -> str:
    """What follows a model's thinking, which may weigh several verdicts; nothing where it was cut while it thought.

    Servers that know of thinking have taken it out already.
    """
    if not text.lstrip().startswith("<think>"):
        return text
    return text.partition("</think>")[2].lstrip()


def _read(ask: Ask, begun: str, sent: Reply) -> tuple[Reply, Verdict]:
    """The verdict in a reply, with the text that has it.

    A reply to a reminder ends what was begun, and is kept with it; but where both together say something else (several
    verdicts, say, of which the reminder asked for one), it counts alone.
    """
    if not begun:
        return sent, ask.read(sent)
    whole = Reply(f"{begun}\n{sent.text}", sent.logprobs)
    try:
        verdict = ask.read(sent)
    except Unreadable:
        return whole, ask.read(whole)
    try:
        return (whole if ask.read(whole) == verdict else sent), verdict
    except Unreadable:
        return sent, verdict


def _likeliest(choice: Mapping[str, Any]) -> dict[str, float]:
    """The first tokens that the server names, with their log-probabilities; empty where it names none."""
    content = (choice.get("logprobs") or {}).get("content") or [{}]
    found: dict[str, float] = {}
    for token in content[0].get("top_logprobs") or []:
        found.setdefault(token["token"], token["logprob"])  # of two that are written alike, the likelier comes first
    return found


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; 0 when it does not, or not in a way that is known."""
    said = headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0
