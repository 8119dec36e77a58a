"""Looking without training: a checked recipe, its rows as tokens, its plan, its objectives, a model's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from aligndistil.artefacts import RunFolder
from aligndistil.data import preview
from aligndistil.data.encoding import Encoder
from aligndistil.data.records import Record, Unusable
from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import start_processes
from aligndistil.errors import ServiceError, UserError
from aligndistil.estimate import Memory, ModelSize, amount, amount_at_most, configuration, memory, model_size
from aligndistil.evaluation import initial_model
from aligndistil.evaluation.samples import decode
from aligndistil.launch import is_code, load_stage_data
from aligndistil.models import load_model, load_tokenizer, shared_vocab, stop_ids
from aligndistil.objectives.base import Role
from aligndistil.pipeline import check_recipe, stages_wanted
from aligndistil.recipe import Model, Recipe, Stage, stage_of
from aligndistil.rollout import SamplingParams, TransformersRollout, sample_seed


def check(recipe: Recipe, processes: int) -> Iterator[str]:
    """One line a stage, once everything that needs no data or weights has been checked."""
    check_recipe(recipe, processes)
    yield f"[green]✓[/] {escape(str(recipe.path))}: {len(recipe.stages)} stage(s) for {processes} process(es)"
    for stage in recipe.stages.values():
        against = ", ".join(f"{role} {path}" for role, path in stage.models.items())
        policy = "on-policy" if stage.on_policy else "off-policy"
        yield f"  [bold]{stage.name}[/]: {stage.objective.name} ({policy}) from {stage.model.path}" + (
            f" against {against}" if against else ""
        )


def _source_stage(recipe: Recipe, stage: Stage) -> Stage:
    """The stage with a model that exists before training: the tokenizer of `stage:NAME` is that of its own model."""
    model = stage.model.model_copy(update={"path": initial_model(recipe, stage)})
    return replace(stage, model=model)


def rows(recipe: Recipe, count: int) -> Iterator[RenderableType]:
    """The first rows of each stage's training data, prompt and response tokens in two colours, and what was dropped."""
    for stage in recipe.stages.values():
        data = load_stage_data(_source_stage(recipe, stage), str)
        yield Text(f"\n{stage.name}: {len(data.train)} {data.train.kind}", style="bold")
        for line in data.train.report.lines():
            yield f"  {line}"
        for index in range(min(count, len(data.train))):
            yield from preview(data.train.rows(index), data.tokenizer)


def plan(recipe: Recipe, only: str | None, processes: int) -> Iterator[RenderableType]:
    """What `train` would do: state, models, steps, tokens and memory of each stage."""
    check_recipe(recipe, processes)
    run = RunFolder(recipe.output_dir)
    unread: set[str] = set()
    for name in stages_wanted(recipe, only):
        stage = recipe.stages[name]
        state = "to train" if run.stage(name).read_done() is None else "was trained before"
        yield f"[bold]{name}[/]: {stage.objective.name}, {state}"
        sizes = _sizes(recipe, stage, unread)
        yield f"  models  {_shown(stage, sizes)}"
        yield f"  data    {_taken(recipe, stage, unread)}"
        if sizes is not None:
            policy, others = sizes
            yield f"  memory  {_needed(memory(stage, policy, others, processes))}"
    if unread:
        yield (
            "The Hub cannot be reached: sizes of its models and numbers of its rows are those that this package knows, "
            "and every row counts as usable and as long as the recipe allows."
        )
    yield "Nothing was trained. Memory is an estimate, for the longest rows that the recipe allows, one GPU a process."


def _needed(m: Memory) -> str:
    parts = {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "DeepSpeed's buffers": m.buffers,
        "frozen models": m.frozen,
        "activations": m.activations,
        "logits": m.logits,
    }
    told = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    sampling = f"; while sampling {m.generation:.2f} instead of the last two" if m.generation else ""
    return f"{m.total:.2f} GiB a process: {told}{sampling}"


def _sizes(recipe: Recipe, stage: Stage, unread: set[str]) -> tuple[ModelSize, dict[Role, ModelSize]] | None:
    """None where a configuration is on the Hub and neither the Hub nor this package gives it."""
    objective, trust = stage.objective, stage.model.trust_remote_code

    def size(path: str, *, scalar: bool) -> ModelSize:
        name = stage_of(path)
        root = path if name is None else initial_model(recipe, recipe.stages[name])
        if isinstance(configuration(root, trust), ServiceError):
            unread.add(root)
        return model_size(root, scalar=scalar, trust_remote_code=trust)

    try:
        policy = size(stage.model.path, scalar=objective.is_scalar)
        models = {role: path for role, path in stage.models.items() if not is_code(path)}
        return policy, {role: size(path, scalar=objective.needs[role].is_scalar) for role, path in models.items()}
    except ServiceError:
        return None


def _shown(stage: Stage, sizes: tuple[ModelSize, dict[Role, ModelSize]] | None) -> str:
    if sizes is None:
        return "unknown: a configuration is on the Hub, which cannot be reached"
    policy, others = sizes
    told = [f"policy {escape(stage.model.path)} ({_millions(policy)})"]
    for role, path in stage.models.items():
        size = f" ({_millions(others[role])})" if role in others else ""
        told.append(f"{role.value.replace('_', ' ')} {escape(path)}{size}")
    return ", ".join(told)


def _millions(size: ModelSize) -> str:
    return f"{size.parameters / 1e6:,.1f} M"


def _taken(recipe: Recipe, stage: Stage, unread: set[str]) -> str:
    """Examples, steps and tokens of training; where the Hub does not give the data, no more than there can be."""
    sources = {source.path for source in stage.data.train}
    taken = None
    if not unread & {initial_model(recipe, stage), *sources}:
        try:
            taken = amount(stage, load_stage_data(_source_stage(recipe, stage), str).train)
        except ServiceError:
            unread |= sources
    taken = taken or amount_at_most(stage)
    if taken is None:
        steps = f"{stage.train.max_steps} steps" if stage.train.max_steps else f"{stage.train.epochs:g} epoch(s)"
        return f"{steps} of {stage.train.batch_size}; the data or the tokenizer are on the Hub, which cannot be reached"
    sampled = f" and up to {taken.sampled:,} sampled" if taken.sampled else ""
    at_most = "" if taken.exact else "at most "
    return (
        f"{at_most}{taken.examples:,} {taken.kind}, {taken.steps:,} steps of {stage.train.batch_size}, "
        f"{at_most}{taken.tokens:,} tokens{sampled}"
    )


def objectives_table(described: Sequence[dict[str, Any]]) -> Table:
    """Name, paper, data, models, rollout and fields of each objective."""
    table = Table("objective", "", box=SIMPLE_HEAD, show_lines=True)
    for one in described:
        models = ", ".join(f"{role} ({need})" for role, need in one["models"].items())
        fields = "\n".join(f"[cyan]{key}[/] = {_field(field)}" for key, field in one["fields"].items())
        facts = {"paper": one["paper"], "data": one["data"], "models": models, "on-policy": one["on_policy"]}
        lines = [f"[bold]{escape(one['summary'])}[/]", *(f"{key}: {value}" for key, value in facts.items()), fields]
        table.add_row(f"[bold]{one['name']}[/]", "\n".join(line for line in lines if line))
    return table


def _field(field: dict[str, Any]) -> str:
    return escape(f"{json.dumps(field['default'])}  {field['description']}")


def answers(
    path: str, prompts: Sequence[str], samples: int, seed: int, max_new_tokens: int, temperature: float, top_p: float
) -> Iterator[tuple[str, str, bool]]:
    """(prompt, sampled answer, whether it ended by itself), `samples` for each prompt."""
    section = Model(path=path)
    tokenizer = load_tokenizer(path, section)
    stops = stop_ids(path, section, tokenizer)
    encoder = Encoder(
        tokenizer,
        stop_ids=stops,
        chat_template=tokenizer.chat_template,
        max_prompt_length=2**31,
        max_response_length=max_new_tokens,
    )
    processes = start_processes()
    model = on_device(load_model(path, section, trained=False), processes.device).eval()
    processes.stop()
    vocab = shared_vocab([model], tokenizer)
    rollout = TransformersRollout(lambda: nullcontext(model), stops, tokenizer.pad_token_id, vocab, batch_size=16)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    seeds = [sample_seed(seed, prompt, k) for prompt in prompts for k in range(samples)]
    params = SamplingParams(max_new_tokens, temperature, top_p)
    encoded = encoder.encode([Record(prompt, ()) for prompt in asked])
    if unusable := [one for one in encoded if isinstance(one, Unusable)]:
        raise UserError(f"--prompt: {unusable[0]}")
    ids = [one.rows[0].prompt_ids for one in encoded if not isinstance(one, Unusable)]
    drawn = rollout.generate(ids, params, seeds)
    for prompt, sample in zip(asked, drawn, strict=True):
        yield prompt, decode(tokenizer, [sample])[0], sample.finished
