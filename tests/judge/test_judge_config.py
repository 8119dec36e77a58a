"""What may be written in a judge's file, what is said of the rest, and where the key comes from."""

from pathlib import Path

import pytest

from aligndistil.errors import EXIT_MISSING, EXIT_USAGE, MissingError, UserError
from aligndistil.judge import JudgeConfig, load_judge, shipped_judges

ENDPOINT = "base_url: http://localhost:8000/v1\nmodel: m\n"


@pytest.fixture
def refused(tmp_path: Path):
    """What is said of a file with this text, without the file's name."""

    def load(text: str) -> list[str]:
        path = tmp_path / "judge.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as error:
            load_judge(path)
        assert error.value.exit_code == EXIT_USAGE
        return [line.removeprefix(f"{path}:") for line in str(error.value).splitlines()]

    return load


def test_a_file_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(
        ENDPOINT + "name: Judge\nkey_env: MY_KEY\nconcurrency: 3\ntimeout: 9\nattempts: 2\nalpaca_eval: ranking\n"
        "decoding: {temperature: 0.5, max_tokens: null, seed: 7}\nprice: {input: 2.5}\n"
        "extra_body: {chat_template_kwargs: {enable_thinking: false}, stop: null}\n"
    )
    config = load_judge(str(path))
    assert (config.name, config.model, config.base_url) == ("Judge", "m", "http://localhost:8000/v1")
    assert (config.key_env, config.concurrency, config.timeout, config.attempts) == ("MY_KEY", 3, 9.0, 2)
    assert config.decoding.model_dump() == {"temperature": 0.5, "max_tokens": None, "top_p": None, "seed": 7}
    assert config.price.model_dump() == {"input": 2.5, "output": 0.0}
    assert config.extra_body == {"chat_template_kwargs": {"enable_thinking": False}, "stop": None}
    assert config.alpaca_eval == "ranking"


def test_a_judge_is_called_after_its_model() -> None:
    assert JudgeConfig(base_url="http://localhost/v1", model="org/m").name == "org/m"
    assert JudgeConfig(reward_model="org/rm").name == "org/rm"


def test_the_path_of_a_reward_model_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text("reward_model: ./models/rm\n")
    assert load_judge(tmp_path / "judge.yaml").reward_model == str(tmp_path / "models/rm")
    (tmp_path / "judge.yaml").write_text("reward_model: models/rm\n")
    assert load_judge(tmp_path / "judge.yaml").reward_model == "models/rm"


def test_the_shipped_judges_load() -> None:
    assert list(shipped_judges()) == ["gold", "qwen2.5-72b-instruct"]
    assert load_judge("gold").gold
    qwen = load_judge("qwen2.5-72b-instruct")
    assert (qwen.model, qwen.base_url) == ("Qwen/Qwen2.5-72B-Instruct", "http://localhost:8000/v1")
    assert f"vllm serve {qwen.model} " in shipped_judges()["qwen2.5-72b-instruct"].read_text()


def test_a_name_that_is_none_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no judge `golden`; did you mean `gold`") as error:
        load_judge("golden")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        load_judge(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]\n", "1:1: a judge is a mapping of keys, such as `base_url:` and `model:`"),
        ("concurency: 3\n" + ENDPOINT, "1:1: concurency: unknown key; did you mean `concurrency`?"),
        (ENDPOINT + "temperature: 0\n", "3:1: temperature: unknown key; write it as `decoding.temperature`"),
        (
            ENDPOINT + "price: {inputs: 1}\n",
            "3:9: price.inputs: unknown key; did you mean `input`?",
        ),
        (ENDPOINT + "attempts: '3'\n", "3:11: attempts: must be a whole number, not the string '3': remove the quotes"),
        (ENDPOINT + "concurrency: 0\n", "3:14: concurrency: must be at least 1, not 0"),
        (ENDPOINT + "decoding: 0\n", "3:11: decoding: must be a mapping such as `{temperature: ...}`, not 0"),
        (ENDPOINT + "decoding: {top_p: 2}\n", "3:19: decoding.top_p: must be at most 1, not 2"),
        (
            ENDPOINT + "alpaca_eval: rank\n",
            "3:14: alpaca_eval: must be one of `weighted` or `ranking`, not the string 'rank'; did you mean `ranking`?",
        ),
        ("model: m\n", "1:1: base_url: is required for a judge behind an endpoint"),
        ("base_url: http://h/v1\n", "1:1: model: is required for a judge behind an endpoint"),
        (
            "concurrency: 3\n",
            "1:1: a judge is either `base_url` with `model`, or `reward_model`, or `gold: true`; here is none of them",
        ),
        (
            "gold: true\nreward_model: rm\n",
            "1:1: a judge is either `base_url` with `model`, or `reward_model`, or `gold: true`; "
            "here are `reward_model` and `gold`",
        ),
        (
            "gold: true\nattempts: 3\n",
            "2:1: attempts: belongs to a judge behind an endpoint, and this one only scores; take it out",
        ),
        (
            "base_url: localhost:8000\nmodel: m\n",
            "1:1: base_url: must be an address such as `http://localhost:8000/v1`",
        ),
        (
            "base_url: http://h/v1/chat/completions\nmodel: m\n",
            "1:1: base_url: must end before `/chat/completions`, as in `http://localhost:8000/v1`",
        ),
        ("base_url: http://h/v1?a=b\nmodel: m\n", "1:1: base_url: must end before `?` and `#`"),
        (ENDPOINT + "extra_body: {seed: 1}\n", "3:14: extra_body.seed: write it as `decoding.seed`"),
        (ENDPOINT + "extra_body: {model: n}\n", "3:14: extra_body.model: write it as `model`"),
        (ENDPOINT + "extra_body: {n: 2}\n", "3:14: extra_body.n: is the benchmark's to decide; take it out"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(refused, text: str, said: str) -> None:
    assert refused(text) == [said]


def test_every_mistake_is_named(refused) -> None:
    assert refused("modle: m\nattempts: 0\nbase_url: http://h/v1\n") == [
        "1:1: modle: unknown key; did you mean `model`?",
        "2:11: attempts: must be at least 1, not 0",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "api_key: sk-secret",
        "API-Key: sk-secret",
        "openai_api_key: sk-secret",
        "key: sk-secret",
        "token: sk-secret",
        "decoding: {api_key: sk-secret}",
        "extra_body: {headers: {Authorization: sk-secret}}",
    ],
)
def test_a_key_in_the_file_is_refused_and_not_shown(refused, line: str) -> None:
    (said,) = refused(f"{ENDPOINT}{line}\n")
    assert said.startswith("3:")
    assert said.endswith(": the key comes from the environment only; take it out, and see `key_env`")
    assert "secret" not in said


def test_a_key_in_place_of_its_name_or_in_the_address_is_not_shown(refused) -> None:
    (said,) = refused(ENDPOINT + "key_env: sk-secret\n")
    assert said == "3:1: key_env: must be the name of an environment variable, which holds the key"
    (said,) = refused("base_url: https://me:secret@api.example.com/v1\nmodel: m\n")
    assert said == (
        "1:1: base_url: must be without user and password; the key comes from the environment only, see `key_env`"
    )


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("10.1.2.3", True),
        ("192.168.0.9", True),
        ("node17", True),
        ("api.openai.com", False),
        ("8.8.8.8", False),
        ("[2001:4860:4860::8888]", False),
    ],
)
def test_only_a_server_of_ones_own_does_without_a_key(monkeypatch: pytest.MonkeyPatch, host: str, local: bool) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    config = JudgeConfig(base_url=f"http://{host}:81/v1", model="m", key_env="MY_KEY")
    if local:
        assert config.api_key() == "EMPTY"
    else:
        with pytest.raises(MissingError, match="the environment variable MY_KEY is not set") as error:
            config.api_key()
        assert error.value.exit_code == EXIT_MISSING
    monkeypatch.setenv("MY_KEY", " sk-secret\n")
    assert config.api_key() == "sk-secret"
    assert "secret" not in repr(config)


def test_what_is_no_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = JudgeConfig(base_url="http://localhost/v1", model="m", key_env="MY_KEY")
    for value in ("sk-se\ncret", "sk-s cret", "sk-é"):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(UserError, match="MY_KEY holds no key") as error:
            config.api_key()
        assert "sk-" not in str(error.value)
