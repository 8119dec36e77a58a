"""A judge behind an endpoint that fails in every way: its verdicts are those of a quiet one, and none is paid twice."""

import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from aligndistil.errors import EXIT_MISSING, EXIT_SERVICE, MissingError, ServiceError
from aligndistil.judge import Ask, EndpointJudge, JudgeConfig, Reply, Unreadable, Usage, VerdictCache, client
from support.judge_server import JudgeServer, every

N, REPEATS = 20, 2
RIGHT = {f"q{i}": i % 7 + 0.5 for i in range(N)}
"""What the server says of each question."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> VerdictCache:
    return VerdictCache(tmp_path / "verdicts.sqlite")


def rating(body: dict[str, Any]) -> str:
    """By the question, whatever was said since."""
    return f"I say [[{RIGHT[body['messages'][0]['content']]}]]"


def read(reply: Reply) -> float:
    found = re.search(r"\[\[([\d.]+)\]\]", reply.text)
    if found is None:
        raise Unreadable("there is no [[rating]]")
    return float(found[1])


def questions(n: int = N, **settings: Any) -> list[Ask]:
    return [Ask(f"q{i}", [{"role": "user", "content": f"q{i}"}], read, 100, **settings) for i in range(n)]


def config_of(server: JudgeServer, **settings: Any) -> JudgeConfig:
    return JudgeConfig(**{"base_url": server.url, "model": "m", "concurrency": 4, **settings})


def asked(bodies: list[dict[str, Any]]) -> Counter[str]:
    return Counter(body["messages"][0]["content"] for body in bodies)


TWICE = Counter(dict.fromkeys(RIGHT, REPEATS))


def test_every_question_is_asked_as_often_as_wanted(cache: VerdictCache) -> None:
    told: list[tuple[int, Usage]] = []

    def reply(body: dict[str, Any]) -> str:
        time.sleep(0.3 if body["messages"][0]["content"] == "q0" else 0.02)  # the first is done last
        return rating(body)

    with JudgeServer(reply) as server:
        judge = EndpointJudge(config_of(server, price={"input": 10, "output": 1000}), cache)
        judged = judge.ask(questions(), REPEATS, "test", lambda done, usage: told.append((done, usage)))
    assert judged.verdicts == [RIGHT, RIGHT]
    assert [list(of_repeat) for of_repeat in (*judged.verdicts, *judged.texts)] == [list(RIGHT)] * 4
    assert judged.texts == [{key: f"I say [[{value}]]" for key, value in RIGHT.items()}] * 2
    assert judged.missing == {}
    assert asked(server.requests) == TWICE
    assert server.most_at_once == 4
    # A question is one word, and an answer three: 10 + 3 * 1000 millionths of a dollar.
    assert judged.usage == Usage(requests=40, input_tokens=40, output_tokens=120, dollars=pytest.approx(40 * 0.00301))
    assert [done for done, _ in told] == list(range(1, 41))
    assert told[-1][1] == judged.usage


@pytest.mark.parametrize(
    "fault", [429, 500, 503, 408, "nonsense", "no choices", "no content", "half json", "cut", "hang"]
)
def test_after_a_fault_everything_is_as_if_it_had_not_been(cache: VerdictCache, fault: int | str) -> None:
    with JudgeServer(rating, faults=every(9, fault)) as server:
        judged = EndpointJudge(config_of(server, timeout=0.2), cache).ask(questions(), REPEATS, "test")
        assert judged.verdicts == [RIGHT, RIGHT]
        assert judged.missing == {}
        assert asked(server.answered) == TWICE
        assert len(server.requests) == 44  # the 9th, 18th, 27th and 36th failed
        assert (judged.usage.requests, judged.usage.retries) == (44, 4)
        again = EndpointJudge(config_of(server), cache).ask(questions(), REPEATS, "test")
        assert again.verdicts == judged.verdicts
        assert again.texts == judged.texts
        assert again.usage == Usage(cached=40)
        assert len(server.requests) == 44


def test_the_request_says_what_the_benchmark_and_the_file_say(cache: VerdictCache) -> None:
    ask = questions(1, temperature=0.7)[0]
    with JudgeServer(rating) as server:
        EndpointJudge(config_of(server), cache).ask([ask], 1, "test")
        own = {"temperature": 0.2, "max_tokens": 9, "top_p": 0.9, "seed": 5}
        EndpointJudge(config_of(server, decoding=own, extra_body={"top_k": 1}), cache).ask([ask], 2, "test")
    body = {"model": "m", "messages": [{"role": "user", "content": "q0"}]}
    first, *others = server.requests
    assert first == body | {"temperature": 0.7, "max_tokens": 100}
    assert sorted(others, key=lambda request: request["seed"]) == [
        body | own | {"top_k": 1, "seed": 5},
        body | own | {"top_k": 1, "seed": 6},
    ]
    assert server.keys == ["EMPTY"] * 3


def test_another_request_is_another_entry_of_the_cache(cache: VerdictCache) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"model": "n"},
        {"decoding": {"max_tokens": 3}},
        {"extra_body": {"top_k": 1}},
    ]
    with JudgeServer(rating) as server:
        for settings in changes:
            EndpointJudge(config_of(server, **settings), cache).ask(questions(1), 1, "test")
        EndpointJudge(config_of(server), cache).ask(questions(1, reminder="Go on."), 1, "test")
        assert len(server.requests) == len(changes) + 1
        unlike = {"name": "other", "concurrency": 1, "timeout": 3, "attempts": 2, "price": {"input": 1}}
        assert EndpointJudge(config_of(server, **unlike), cache).ask(questions(1), 2, "test").usage.cached == 1
        assert len(server.requests) == len(changes) + 2  # the second repeat


def test_one_request_of_two_questions_is_sent_once(cache: VerdictCache) -> None:
    same = [Ask(key, [{"role": "user", "content": "q1"}], read, 100) for key in ("first", "second")]
    with JudgeServer(rating) as server:
        server.delay = 0.05
        judged = EndpointJudge(config_of(server), cache).ask(same, 1, "test")
    assert judged.verdicts == [{"first": 1.5, "second": 1.5}]
    assert (judged.usage.requests, judged.usage.cached) == (1, 1)


def test_log_probabilities_are_asked_for_read_and_kept(cache: VerdictCache) -> None:
    seen: list[Reply] = []

    def preference(reply: Reply) -> float:
        seen.append(reply)
        return reply.logprobs["m"]

    ask = Ask("q0", [{"role": "user", "content": "q0"}], preference, 1, top_logprobs=5)
    with JudgeServer(lambda body: ("M", {"M": -0.1, "m": -2.5, " m": -4.0})) as server:
        for _ in range(2):
            assert EndpointJudge(config_of(server), cache).ask([ask], 1, "test").verdicts == [{"q0": -2.5}]
    assert seen == [Reply("M", {"M": -0.1, "m": -2.5, " m": -4.0})] * 2
    (request,) = server.requests
    assert (request["logprobs"], request["top_logprobs"]) == (True, 5)


def test_a_server_without_log_probabilities_is_refused(cache: VerdictCache) -> None:
    with JudgeServer(rating) as server, pytest.raises(ServiceError) as error:
        EndpointJudge(config_of(server), cache).ask(questions(top_logprobs=5), 1, "alpaca_eval")
    assert error.value.exit_code == EXIT_SERVICE
    assert "gives no log-probabilities" in str(error.value)
    assert "`alpaca_eval: ranking`" in str(error.value)
    assert len(server.requests) <= 4  # those that were on their way


def test_a_reply_that_goes_on_after_a_reminder_is_read_as_one(cache: VerdictCache) -> None:
    def reply(body: dict[str, Any]) -> str:
        return "Let me think." if len(body["messages"]) == 1 else "So: [[3.5]]"

    with JudgeServer(reply) as server:
        for _ in range(2):
            judged = EndpointJudge(config_of(server), cache).ask(questions(1, reminder="Go on."), 1, "test")
            assert judged.verdicts == [{"q0": 3.5}]
            assert judged.texts == [{"q0": "Let me think.\nSo: [[3.5]]"}]
    first, second = server.requests
    assert second["messages"] == [
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "Let me think."},
        {"role": "user", "content": "Go on."},
    ]
    assert {**second, "messages": first["messages"]} == first


def test_it_is_reminded_once_and_then_asked_anew(cache: VerdictCache) -> None:
    with JudgeServer(lambda body: "Hm.") as server:
        judge = EndpointJudge(config_of(server, attempts=4), cache)
        judged = judge.ask(questions(1, reminder="Go on."), 1, "test")
    assert judged.missing == {"q0": "no verdict in 4 attempts: there is no [[rating]]"}
    assert [len(body["messages"]) for body in server.requests] == [1, 3, 1, 1]
    assert [body.get("seed") for body in server.requests] == [None, None, 1000, 2000]


def test_a_reminder_that_is_too_long_for_the_judge_is_given_up(cache: VerdictCache) -> None:
    replies = iter(["Hm.", "[[1.5]]"])
    with JudgeServer(lambda body: next(replies), faults={2: 400}) as server:
        judged = EndpointJudge(config_of(server), cache).ask(questions(1, reminder="Go on."), 1, "test")
    assert judged.verdicts == [{"q0": 1.5}]
    assert [len(body["messages"]) for body in server.requests] == [1, 3, 1]


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [
        ({}, {None, 1000, 2000, 1001, 2001}),
        ({"decoding": {"seed": 3}}, {3, 1003, 2003, 4, 1004, 2004}),
        ({"decoding": {"temperature": 1.0}}, {None}),
        ({"decoding": {"temperature": 1.0, "seed": 3}}, {3, 1003, 2003, 4, 1004, 2004}),
    ],
)
def test_every_attempt_at_a_verdict_has_its_own_seed(cache: VerdictCache, settings: dict[str, Any], seeds: set) -> None:
    with JudgeServer(lambda body: "Hm.") as server:
        judged = EndpointJudge(config_of(server, attempts=3, **settings), cache).ask(questions(1), 2, "test")
    assert {body.get("seed") for body in server.requests} == seeds
    assert len(server.requests) == 6
    why = "no verdict in 3 attempts: there is no [[rating]]"
    assert judged.missing == {"q0": f"repeat 1: {why}; repeat 2: {why}"}


def test_what_cannot_be_read_is_missing_and_the_rest_is_not(cache: VerdictCache) -> None:
    def reply(body: dict[str, Any]) -> str:
        return "Hm." if body["messages"][0]["content"] == "q3" else rating(body)

    with JudgeServer(reply) as server:
        judged = EndpointJudge(config_of(server, attempts=3), cache).ask(questions(), 1, "test")
        assert judged.verdicts == [{key: value for key, value in RIGHT.items() if key != "q3"}]
        assert judged.missing == {"q3": "no verdict in 3 attempts: there is no [[rating]]"}
        assert asked(server.requests)["q3"] == 3
        server.reply = rating
        again = EndpointJudge(config_of(server), cache).ask(questions(), 1, "test")
    assert again.verdicts == [RIGHT]
    assert again.usage.requests == 1


def test_a_parser_that_changed_reads_the_old_replies_first(cache: VerdictCache) -> None:
    def stricter(reply: Reply) -> float:
        if "surely" not in reply.text:
            raise Unreadable("it is not sure")
        return -read(reply)

    new = [Ask(ask.key, ask.messages, stricter, ask.max_tokens) for ask in questions()]
    with JudgeServer(lambda body: rating(body) + (" surely" if rating(body) == "I say [[0.5]]" else "")) as server:
        EndpointJudge(config_of(server), cache).ask(questions(), 1, "test")
        server.reply = lambda body: f"{rating(body)} surely"
        judged = EndpointJudge(config_of(server), cache).ask(new, 1, "test")
        assert judged.verdicts == [{key: -value for key, value in RIGHT.items()}]
        assert (judged.usage.cached, judged.usage.requests) == (3, 17)  # q0, q7 and q14 were read
        assert EndpointJudge(config_of(server), cache).ask(new, 1, "test").usage == Usage(cached=20)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_is_missing(cache: VerdictCache, status: int) -> None:
    with JudgeServer(rating, faults={3: status}) as server:
        judged = EndpointJudge(config_of(server, concurrency=1), cache).ask(questions(), 1, "test")
    assert judged.verdicts == [{key: value for key, value in RIGHT.items() if key != "q2"}]
    assert judged.missing == {"q2": f"status {status}: scripted failure {status} for the key EMPTY"}
    assert len(server.requests) == N


def test_when_all_are_refused_the_judge_is_to_blame(cache: VerdictCache) -> None:
    with JudgeServer(rating, faults=every(1, 400)) as server, pytest.raises(ServiceError) as error:
        EndpointJudge(config_of(server), cache).ask(questions(), 1, "test")
    assert "refuses every question (status 400: scripted failure 400" in str(error.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "refuses the key, which comes from the variable MY_KEY"),
        (403, "refuses the key, which comes from the variable MY_KEY"),
        (404, "check `base_url` and `model`"),
        (402, "refuses to answer"),
    ],
)
def test_no_use_in_going_on(cache: VerdictCache, monkeypatch: pytest.MonkeyPatch, status: int, said: str) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with JudgeServer(rating, faults={6: status}) as server, pytest.raises(ServiceError) as error:
        EndpointJudge(config_of(server, key_env="MY_KEY", concurrency=1), cache).ask(questions(), 1, "mt_bench")
    sentence = str(error.value)
    assert error.value.exit_code == EXIT_SERVICE
    assert sentence.startswith("mt_bench: the judge m at 127.0.0.1:")
    assert said in sentence
    assert f"status {status}: scripted failure {status}" in sentence
    assert sentence.endswith("; 5 of 20 verdicts are there, and the same command goes on from them")
    assert "\n" not in sentence
    assert len(server.requests) == 6


def test_the_key_is_sent_and_stands_nowhere_else(cache: VerdictCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with JudgeServer(rating, faults={4: 400, 9: 401}) as server:
        judge = EndpointJudge(config_of(server, concurrency=1), cache)
        with pytest.raises(ServiceError) as error:
            judge.ask(questions(), 1, "test")
        judged = judge.ask(questions(), 1, "test")
        server.faults = every(1, 400)
        refused = judge.ask([*questions(), Ask("new", [{"role": "user", "content": "new"}], read, 1)], 1, "test")
    assert set(server.keys) == {"sk-secret"}
    assert "scripted failure 401 for the key ***" in str(error.value)
    assert refused.missing == {"new": "status 400: scripted failure 400 for the key ***"}
    shown = [repr(judge.config), repr(judge), judge.about, repr(judged), *traceback.format_exception(error.value)]
    assert "secret" not in "".join(shown)
    for file in cache.path.parent.iterdir():
        assert b"secret" not in file.read_bytes()


def test_pauses_grow_and_a_fault_that_stays_ends_the_call(cache: VerdictCache, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real = client.asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    monkeypatch.setattr(client, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 20.0)
    with JudgeServer(rating, faults=every(1, 500)) as server, pytest.raises(ServiceError) as error:
        EndpointJudge(config_of(server, concurrency=1), cache).ask(questions(), 1, "test")
    assert len(server.requests) == 8
    longest = [1, 2, 4, 8, 16, 20, 20]
    assert len(pauses) == 7
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert len({pause / most for pause, most in zip(pauses, longest, strict=True)}) == 7
    assert "has not answered one question in 8 attempts (status 500: scripted failure 500" in str(error.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut", "Server disconnected"),
        ("hang", "no reply within 0.2 s"),
        ("half json", 'what it sends is no completion: {"id": '),
    ],
)
def test_what_goes_wrong_is_said(cache: VerdictCache, fault: str, said: str) -> None:
    with JudgeServer(rating, faults=every(1, fault)) as server, pytest.raises(ServiceError) as error:
        EndpointJudge(config_of(server, attempts=2, timeout=0.2), cache).ask(questions(), 1, "test")
    assert said in str(error.value)


def test_the_server_says_how_long_to_wait(cache: VerdictCache) -> None:
    with JudgeServer(rating, faults={1: 429}) as server:
        server.retry_after = "0.7"
        started = time.monotonic()
        assert EndpointJudge(config_of(server), cache).ask(questions(1), 1, "test").verdicts == [{"q0": 0.5}]
        assert time.monotonic() - started >= 0.7
        server.retry_after, server.faults = "7200", every(1, 429)
        with pytest.raises(ServiceError, match="wants to be asked again in 7200 seconds"):
            EndpointJudge(config_of(server), cache).ask(questions(2), 1, "test")


def test_the_ways_to_say_it() -> None:
    waits = {"3": 3.0, "": 0.0, "soon": 0.0, "-3": 0.0, "nan": 0.0, formatdate(time.time() - 9, usegmt=True): 0.0}
    for said, seconds in waits.items():
        assert client._retry_after({"retry-after": said}) == seconds
    assert 28 < client._retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert client._retry_after({}) == 0.0


def test_after_the_server_died_only_what_is_missing_is_asked(cache: VerdictCache) -> None:
    with JudgeServer(rating, faults={21: "die"}) as server:
        judge = EndpointJudge(config_of(server, attempts=2), cache)
        with pytest.raises(ServiceError) as error:
            judge.ask(questions(), REPEATS, "test")
        # 20 requests were good, and the answers to 3 of them may have been on their way.
        assert 17 <= int(re.search(r"; (\d+) of 40 verdicts are there", str(error.value))[1]) <= 20
        server.revive()
        before = len(server.requests)
        judged = judge.ask(questions(), REPEATS, "test")
    assert judged.verdicts == [RIGHT, RIGHT]
    assert 17 <= judged.usage.cached <= 20
    assert judged.usage.requests == len(server.requests) - before == 40 - judged.usage.cached


def verdicts_on(url: str, path: str) -> list[Any]:
    config = JudgeConfig(base_url=url, model="m", concurrency=4)
    judged = EndpointJudge(config, VerdictCache(Path(path))).ask(questions(), REPEATS, "test")
    return [list(judged.verdicts), judged.usage.requests + judged.usage.cached]


def test_control_c_ends_at_once_and_the_cache_goes_on(cache: VerdictCache) -> None:
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    with JudgeServer(rating) as server:
        server.delay = 0.1
        call = f"import test_judge_client as t; t.verdicts_on({server.url!r}, {{!r}})"
        code = f"import sys; sys.path[:0] = {folders}; {call}"
        process = subprocess.Popen(
            [sys.executable, "-c", code.format(str(cache.path))], stderr=subprocess.PIPE, text=True
        )
        while len(server.answered) < 9:
            assert process.poll() is None
            time.sleep(0.01)
        server.delay = 30.0  # of what is asked from now on
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, said = process.communicate(timeout=25)
        assert time.monotonic() - started < 10
        assert said.rstrip().endswith("KeyboardInterrupt")
        server.delay = 0.0
        judged = EndpointJudge(config_of(server), cache).ask(questions(), REPEATS, "test")
    assert judged.verdicts == [RIGHT, RIGHT]
    assert 5 <= judged.usage.cached <= 20  # 9 answers and more, 4 of which may have been on their way
    assert judged.usage.requests == 40 - judged.usage.cached


def test_two_processes_share_a_cache(cache: VerdictCache, on_processes: Any) -> None:
    with JudgeServer(rating) as server:
        server.delay = 0.01
        answers = on_processes(verdicts_on, server.url, str(cache.path))
        assert answers == [[[RIGHT, RIGHT], 40]] * 2
        assert 40 <= len(server.requests) <= 80
        assert EndpointJudge(config_of(server), cache).ask(questions(), REPEATS, "test").usage == Usage(cached=40)


def test_it_says_who_judges_and_how(cache: VerdictCache) -> None:
    plain = JudgeConfig(base_url="http://localhost:8000/v1", model="org/m")
    assert EndpointJudge(plain, cache).about == "org/m at localhost:8000, decoding as the benchmark says"
    own = {"decoding": {"temperature": 0.5, "seed": 1}, "extra_body": {"chat_template_kwargs": {"thinking": False}}}
    named = JudgeConfig(base_url="http://localhost:8000/v1", model="org/m", name="M", **own)
    judge = EndpointJudge(named, cache)
    assert (judge.name, judge.scores_only) == ("M", False)
    assert judge.about == (
        "M (org/m at localhost:8000), decoding as the benchmark says, but temperature 0.5, seed 1, "
        'chat_template_kwargs {"thinking": false}'
    )


def test_what_is_needed_is_said_before_anything_is_asked(cache: VerdictCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(MissingError, match="the environment variable OPENAI_API_KEY is not set"):
        EndpointJudge(JudgeConfig(base_url="https://api.openai.com/v1", model="m"), cache)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingError, match=re.escape('pip install "aligndistil[eval]"')) as error:
        EndpointJudge(JudgeConfig(base_url="http://localhost:8000/v1", model="m"), cache)
    assert error.value.exit_code == EXIT_MISSING


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<think>Perhaps [[1]], or [[9]].</think>\n\nI say [[4]]", 4.0),
        ("\n<think>[[9]]</think>[[5]]", 5.0),
        ("I <think> it is [[6]]", 6.0),  # no thinking, but a word
        ("<think>Perhaps [[1]], or", None),  # cut while it thought
    ],
)
def test_what_a_judge_thinks_is_no_verdict(cache: VerdictCache, reply: str, verdict: float | None) -> None:
    with JudgeServer(lambda body: reply) as server:
        judged = EndpointJudge(config_of(server, attempts=1), cache).ask(questions(1), 1, "test")
    assert judged.verdicts[0].get("q0") == verdict


def test_a_reminder_mends_a_reply_that_said_too_much(cache: VerdictCache) -> None:
    def read_one(reply: Reply) -> float:
        found = re.findall(r"\[\[([\d.]+)\]\]", reply.text)
        if len(set(found)) != 1:
            raise Unreadable("not one [[rating]]")
        return float(found[0])

    ask = Ask("q0", [{"role": "user", "content": "q0"}], read_one, 100, reminder="One rating.")
    replies = iter(["[[1]] or [[2]]", "[[2]]"])
    with JudgeServer(lambda body: next(replies)) as server:
        for _ in range(2):  # the second time out of the cache
            judged = EndpointJudge(config_of(server), cache).ask([ask], 1, "test")
            assert (judged.verdicts, judged.texts) == ([{"q0": 2.0}], [{"q0": "[[2]]"}])
    assert len(server.requests) == 2


def test_one_question_that_always_fails_is_missing_where_others_are_answered(cache: VerdictCache) -> None:
    with JudgeServer(rating) as server:
        real = server.reply
        bad: list[int] = []

        def reply(body: dict[str, Any]) -> Any:
            if body["messages"][0]["content"] == "q3":
                bad.append(1)
            return real(body)

        class Always500(dict[int, Any]):
            def get(self, number: Any, default: Any = None) -> Any:
                return 500 if server.requests[-1]["messages"][0]["content"] == "q3" else None

        server.faults = Always500()
        judged = EndpointJudge(config_of(server, attempts=3, concurrency=1), cache).ask(questions(), 1, "test")
    assert not bad
    assert list(judged.missing) == ["q3"]
    assert "no reply in 3 attempts: status 500" in judged.missing["q3"]
    assert len(judged.verdicts[0]) == N - 1


def test_what_the_cache_saved_is_known(cache: VerdictCache) -> None:
    price = {"input": 10.0, "output": 20.0}
    with JudgeServer(rating) as server:
        first = EndpointJudge(config_of(server, price=price), cache).ask(questions(), 1, "test").usage
        second = EndpointJudge(config_of(server, price=price), cache).ask(questions(), 1, "test").usage
    assert first.dollars == pytest.approx((N * 1 * 10 + N * 3 * 20) / 1e6)  # words: one in, three out
    assert (first.saved, second.dollars) == (0, 0)
    assert second.saved == pytest.approx(first.dollars)
