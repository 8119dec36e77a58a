"""Who judges: a file of a few lines, or one of those that come with the package. A key is never in it."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, JsonValue, model_validator

from aligndistil.errors import MissingError, UserError, did_you_mean, guess_and_list, listed
from aligndistil.recipe.problems import Problem, raise_all, validated
from aligndistil.recipe.sections import Section, Text, refusal
from aligndistil.recipe.yaml_positions import Node, parse_yaml, read_text

NO_KEY = "EMPTY"
"""What a server that asks for no key is given, since the protocol has a place for one."""

_KEY = re.compile(r"(.+_)?(api_?key|authorization|password|secret|(access|auth|bearer)_token)|key|token")
_OF_THE_BENCHMARK = ("messages", "logprobs", "top_logprobs", "n", "stream")


class Decoding(Section):
    """How the judge decodes; null leaves it to the benchmark."""

    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest reply."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    seed: int | None = Field(default=None, ge=0)
    """Of the first repeat; the next repeat has the next one."""


class Price(Section):
    """Dollars per million tokens."""

    input: float = Field(default=0.0, ge=0)
    """Of what the judge reads."""
    output: float = Field(default=0.0, ge=0)
    """Of what it writes."""


_SECTIONS: dict[str, type[BaseModel]] = {"decoding": Decoding, "price": Price}


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible endpoint (`base_url` and `model`), a reward model, or the exact reward."""

    name: Text = ""
    """What tables call it; by default the model."""
    base_url: Text | None = None
    """Where the endpoint is, up to and without `/chat/completions`."""
    model: Text | None = None
    """What the endpoint calls the model."""
    reward_model: Text | None = None
    """A reward model that scores instead: a folder, or a Hub id. A path that starts with `./` or `../` is relative to
    the file."""
    gold: bool = False
    """Score by the exact reward of `builtin:reviews` instead."""
    key_env: Text = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key."""
    concurrency: int = Field(default=16, ge=1)
    """Requests at a time."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that one request may take."""
    attempts: int = Field(default=8, ge=1)
    """Requests that one question may take, when they fail or what comes back cannot be read."""
    decoding: Decoding = Decoding()
    """Where it differs from the benchmark's own."""
    max_tokens_as: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the request says the longest reply; OpenAI's reasoning models take only the second."""
    extra_body: dict[str, JsonValue] = Field(default={})
    """More of the request's body, such as `chat_template_kwargs`."""
    price: Price = Price()
    """What tokens cost."""
    alpaca_eval: Literal["weighted", "ranking"] = "weighted"
    """How AlpacaEval's verdict is read: from the log-probabilities of the first token, or from the text."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "name" in given:
            return given
        name = given.get("model") or given.get("reward_model")
        return {"name": name if isinstance(name, str) else "gold", **given}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        endpoint = self.base_url is not None or self.model is not None
        scored = self.reward_model is not None
        if endpoint + scored + self.gold != 1:
            given = [key for key in ("base_url", "model", "reward_model", "gold") if getattr(self, key)]
            text = "a judge is either `base_url` with `model`, or `reward_model`, or `gold: true`"
            raise refusal("", f"{text}; {f'here are {listed(given)}' if given else 'here is none of them'}")
        if not endpoint:
            for key in sorted(self.model_fields_set - {"name", "reward_model", "gold"}):
                raise refusal(key, "belongs to a judge behind an endpoint, and this one only scores; take it out")
            return self
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):  # perhaps the key itself, so it is not shown
            text = "must be the name of an environment variable, which holds the key"
            raise refusal("key_env", text)
        if self.base_url is None or self.model is None:
            raise refusal("model" if self.model is None else "base_url", "is required for a judge behind an endpoint")
        if wrong := _wrong_address(self.base_url):
            raise refusal("base_url", wrong)
        for key in self.extra_body:
            if key == "model" or key in Decoding.model_fields:
                raise refusal(f"extra_body.{key}", f"write it as `{key if key == 'model' else f'decoding.{key}'}`")
            if key in _OF_THE_BENCHMARK:
                raise refusal(f"extra_body.{key}", "is the benchmark's to decide; take it out")
        return self

    @property
    def host(self) -> str:
        """Host and port of the endpoint."""
        return urlsplit(self.base_url or "").netloc

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is this machine, or one beside it."""
        return _is_local(urlsplit(self.base_url or "").hostname or "")

    def api_key(self) -> str:
        """The endpoint's key, which a server of one's own does without. Raises MissingError when it is not set.

        And UserError when it is none.
        """
        key = os.environ.get(self.key_env, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"the environment variable {self.key_env} holds no key: there are spaces or accents in it")
        if key or self.is_local:
            return key or NO_KEY
        raise MissingError(
            f"the judge {self.name} at {self.host} needs a key, and the environment variable {self.key_env} is not "
            f"set; run `export {self.key_env}=...`, or name the variable that holds it as `key_env` in the judge's file"
        )


def _wrong_address(url: str) -> str:
    """What is wrong with the address of an endpoint; nothing when it is right."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        whole = False
    if not whole:
        return "must be an address such as `http://localhost:8000/v1`"
    if "@" in parts.netloc:
        return "must be without user and password; the key comes from the environment only, see `key_env`"
    if parts.query or parts.fragment:
        return "must end before `?` and `#`"
    if parts.path.rstrip("/").endswith("/completions"):
        return "must end before `/chat/completions`, as in `http://localhost:8000/v1`"
    return ""


def _is_local(host: str) -> bool:
    """Whether it is this machine or one beside it: loopback, a private address, or a name without a domain."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(".localhost")


def shipped_judges() -> dict[str, Path]:
    """The judges that come with the package, by name."""
    folder = Path(str(files("aligndistil") / "assets" / "judges"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_judge(name_or_path: str | Path) -> JudgeConfig:
    """Read a .yaml file, or the shipped one of that name. Raises UserError with one line for each problem."""
    path, known = Path(name_or_path), shipped_judges()
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        if str(name_or_path) not in known:
            hint = guess_and_list(str(name_or_path), known, "judges that come with the package")
            raise UserError(f"there is no judge `{name_or_path}`{hint}; or give the path of a .yaml file")
        path = known[str(name_or_path)]
    tree = parse_yaml(read_text(path), str(path))
    if tree.mapping is None:
        raise UserError(f"{tree.value_at}: a judge is a mapping of keys, such as `base_url:` and `model:`")
    problems = [
        Problem(child.at, child.path, "the key comes from the environment only; take it out, and see `key_env`")
        for node in tree.walk()
        for key, child in (node.mapping or {}).items()
        if _is_key(key)
    ]
    config = validated(JudgeConfig, _known(tree, JudgeConfig, problems), problems)
    raise_all(problems)
    assert config is not None
    if config.reward_model is not None and config.reward_model.startswith(("./", "../")):
        moved = os.path.normpath(path.parent / config.reward_model)
        config = config.model_copy(update={"reward_model": moved if moved.startswith(("/", "..")) else f"./{moved}"})
    return config


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name.lower().replace("-", "_")) is not None


def _known(node: Node, cls: type[BaseModel], problems: list[Problem]) -> Node:
    """The mapping without nulls, which are as good as unwritten, and without unknown keys: a problem for each.

    What a recipe would say of an unknown key, that it belongs to another of its sections, is no help here.
    """
    kept = {}
    for key, child in (node.mapping or {}).items():
        if key in cls.model_fields:
            section = _SECTIONS.get(key) if child.mapping is not None else None
            if child.value is not None:
                kept[key] = child if section is None else _known(child, section, problems)
        elif not _is_key(key):
            hint = did_you_mean(key, cls.model_fields) or f"; the keys here are {listed(cls.model_fields)}"
            if cls is JudgeConfig and key in Decoding.model_fields:
                hint = f"; write it as `decoding.{key}`"
            problems.append(Problem(child.at, child.path, f"unknown key{hint}"))
    return replace(node, value=kept)
