"""What a stage's data say of the stage before any weight is loaded: whether its models can read them, and a report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from aligndistil.errors import UserError, printable
from aligndistil.models import config_of, positions, text_part
from aligndistil.objectives.base import Prepares, Role, Sampled
from aligndistil.recipe import Model, Stage
from aligndistil.training.batches import Schedule
from aligndistil.training.data import Locate, StageData
from aligndistil.training.python_reward import is_code

_EXPERTS = re.compile(r"(^|_)(num|n)_(local_|routed_)?experts$")
"""What the configurations of mixtures of experts call how many there are."""


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest text that models are given."""

    what: str
    tokens: int
    lower: str
    """The fields that make it shorter."""


def data_lines(stage: Stage, data: StageData) -> list[str]:
    """What a person should know of the data, one fact a line."""
    lines = data.train.report.lines()
    other = data.eval_prompts if stage.on_policy else data.eval
    if other is not None and (shared := other.shared_with(data.train)):
        what = "prompts" if stage.on_policy else "examples"
        lines.append(f"{shared} of {len(other)} {what} to evaluate on are in the training data too")
    sampler = Schedule.of(stage, len(data.train)).sampler
    if sampler.n < sampler.batch_size:
        lines.append(
            f"an epoch has {sampler.n} {data.train.kind}, fewer than a batch of {sampler.batch_size}: every step sees "
            "some of them more than once"
        )
    if (evaluated := data.eval or data.eval_prompts) is not None:
        count, *rest = evaluated.report.lines()
        lines += [f"evaluation: {line}" for line in [count, *(line for line in rest if line not in lines)]]
    return [printable(line) for line in lines]


def model_lines(stage: Stage, locate: Locate) -> list[str]:
    """What a person should know of how the models of a stage are trained. `locate` as for `check_lengths`."""
    composite, rollout = text_part(locate(stage.model.path), stage.model), stage.rollout
    lines = [] if composite is None else [composite]
    given = {} if rollout is None else {"temperature": rollout.temperature, "top_p": rollout.top_p}
    if drawn := ", ".join(f"rollout.{name} {value:g}" for name, value in given.items() if value != 1):
        if stage.objective.sampled is Sampled.TEMPERED:
            what = "the policy at this temperature is trained: sample it so; evaluations and the comparison have 1"
        else:
            what = "other texts are learnt from than the policy's own; what is learnt of each stays the same"
        lines.append(f"{drawn}: {what}")
    for path in dict.fromkeys([stage.model.path, stage.models.get(Role.CRITIC, stage.model.path)]):
        experts = [
            value for key, value in _numbers(config_of(locate(path), stage.model).to_dict()) if _EXPERTS.search(key)
        ]
        # That loss is a product of means over a batch: each way of cutting one into micro-batches would have its own.
        if max(experts, default=1) > 1:
            lines.append(
                f"model {path} is a mixture of {max(experts)} experts, and its load-balancing loss is not trained "
                "with: the objective alone moves its routers"
            )
    return [printable(line) for line in lines]


def _numbers(config: dict[Any, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield str(key), value


def check_lengths(stage: Stage, data: StageData, locate: Locate) -> list[str]:
    """Whether all models of a stage can read its data, its rollouts and its evaluation samples.

    `locate` gives the model that `stage:NAME` starts from, where that is not trained yet. Returns sentences about
    models that have seen no texts of this length. Raises UserError where a model cannot read it at all.
    """
    models = {stage.where("model", "path"): stage.model.path}
    models |= {stage.where("models", role): path for role, path in stage.models.items() if not is_code(path)}
    read = check_positions(_read(stage, data), models, stage.model, locate)
    policy = {stage.where("model", "path"): stage.model.path}
    return read + check_positions(_sampled(stage, data), policy, stage.model, locate)


def check_positions(texts: Iterable[Longest], models: dict[str, str], section: Model, locate: Locate) -> list[str]:
    """The same of any texts; `models` are paths by the place in the recipe that names them."""
    texts, warnings, seen = list(texts), [], set[str]()
    for where, path in models.items():
        if locate(path) in seen or not texts:
            continue
        seen.add(locate(path))
        limit = positions(locate(path), section)
        for text in texts:
            if limit is None or text.tokens <= limit.count:
                continue
            sentence = f"model {path} has {limit.count} positions, and {text.what} needs {text.tokens}"
            if limit.fixed:
                raise UserError(f"{where}: {sentence}; lower {text.lower}, to {limit.count} together")
            warnings.append(f"{sentence}, more than it was made for; lower {text.lower}, to {limit.count} together")
    return warnings


def _read(stage: Stage, data: StageData) -> Iterator[Longest]:
    limits = "data.max_prompt_length and data.max_response_length"
    lengths = data.train.lengths()
    if stage.rollout is not None:
        longest = int(lengths[:, 0].argmax())
        yield Longest(
            f"the longest prompt ({data.train.key(longest)}) with rollout.max_new_tokens",
            int(lengths[longest, 0]) + stage.rollout.max_new_tokens,
            "rollout.max_new_tokens and data.max_prompt_length",
        )
    elif stage.objective.prepares is Prepares.MISMATCHED:
        what = "the longest prompt with the longest response, which may be read together,"
        yield Longest(what, int(lengths.max(0).sum()), limits)
    else:
        longest = int(lengths.sum(1).argmax())
        yield Longest(f"the longest row ({data.train.key(longest)})", int(lengths[longest].sum()), limits)
    if data.eval is not None and stage.objective.prepares is not Prepares.ROLLOUT:
        lengths = data.eval.lengths()[: stage.evaluation.limit].sum(1)
        longest = int(lengths.argmax())
        yield Longest(f"the longest row to evaluate on ({data.eval.key(longest)})", int(lengths[longest]), limits)


def _sampled(stage: Stage, data: StageData) -> Iterator[Longest]:
    settings = stage.evaluation
    if data.eval_prompts is None or not settings.samples or stage.objective.is_scalar:
        return
    prompt = int(data.eval_prompts.lengths()[: settings.samples, 0].max())
    field = "evaluation.max_new_tokens" if settings.max_new_tokens else "data.max_response_length"
    yield Longest(
        f"the longest prompt of evaluation.samples with {field}",
        prompt + (settings.max_new_tokens or stage.data.max_response_length),
        f"{field} and data.max_prompt_length",
    )
