"""The commands parse, call and print; everything heavy is imported inside them, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import rich
import typer

from aligndistil import __version__
from aligndistil.errors import EXIT_SIGINT, UserError, for_console, of_the_system, printable
from aligndistil.stop import end_with_parent, interrupted

app = typer.Typer(
    name="aligndistil",
    help="Token-level alignment of language models: AlignDistil and its baselines on one engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML), or the name of a shipped one.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override a field, e.g. --set train.seed=1. Repeatable; the last one wins.", metavar="K=V"
    ),
]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage, and what it depends on.")] = None,
    processes: Annotated[str, typer.Option(help="Processes to start on this machine: a number, or auto.")] = "1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, whether it fits, and how long it may take.")
    ] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of the card that --dry-run plans for; else the one that is there.")
    ] = None,
    gpu_tflops: Annotated[
        float | None, typer.Option(help="Its peak in bfloat16, where it is not there or not known.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what is finished; old folders are kept.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all finished models, and train damaged ones.")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Permit rewards that are Python functions.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train the stages of a recipe that are not finished, and compare their models."""
    from aligndistil.commands.launch import must_start, process_count, start, stop_timeout_of
    from aligndistil.commands.train import train
    from aligndistil.progress import console_may_be_lost

    for option, value in (("--gpu-memory", gpu_memory), ("--gpu-tflops", gpu_tflops)):
        if value is not None and not dry_run:
            raise UserError(f"{option} is of the card that a dry run plans for; add --dry-run, or leave it out")
        if value is not None and not 0 < value < 1e5:
            raise UserError(f"{option} {value:g}: write a number above 0, as a data sheet has it")
    loaded = _load(recipe, overrides)
    if dry_run:
        from aligndistil.commands.cards import card_of
        from aligndistil.commands.plan import plan

        card, asked = card_of(gpu_memory, gpu_tflops), {"fresh": fresh, "verify": verify, "allow_code": allow_code}
        for text in plan(loaded, stage, process_count(processes), card=card, **asked):
            rich.print(text)
        return
    if must_start(processes):
        raise typer.Exit(start(process_count(processes), sys.argv[1:], stop_timeout_of(loaded)))
    with console_may_be_lost():
        train(loaded, stage=stage, fresh=fresh, verify=verify, allow_code=allow_code)


@app.command()
def compare(
    given: Annotated[list[str], typer.Argument(help="A recipe, or finished runs.", metavar="RECIPE | RUN ...")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train the recipe with so many seeds.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
    processes: Annotated[str, typer.Option(help="Processes to start on this machine: a number, or auto.")] = "1",
    jobs: Annotated[int, typer.Option(min=1, help="Seeds to train at the same time.")] = 1,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Permit rewards that are Python functions.")] = False,
) -> None:
    """Compare a recipe's models in tables and pictures, training what is not finished first; or finished runs."""
    from aligndistil.commands.compare import Options, compare
    from aligndistil.progress import console_may_be_lost

    with console_may_be_lost():
        code = compare(given, Options(overrides or (), seeds, out, processes, jobs, allow_code))
    raise typer.Exit(code)


@app.command()
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL ...]", help="Runs, stages, model folders or Hub ids; or LABEL=MODEL."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", "-b", help="alpaca_eval, mt_bench, arena_hard, reward_bench_2, human_agreement."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A JUDGE.yaml, qwen2.5-72b-instruct, gold, or the folder of a reward model.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Also the win rate against this model.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Data with a column `prompt`, for --against; #SPLIT may follow.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of answers, verdicts and tables.")] = Path("evaluation"),
    answers: Annotated[
        list[Path] | None, typer.Option(help="Answers made elsewhere, in the benchmark's format; or LABEL=FILE.")
    ] = None,
    answers_only: Annotated[bool, typer.Option("--answers-only", help="Write the answers, and judge nothing.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="How often the judge is asked everything.")] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each benchmark.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the benchmarks' files, on a machine without a network.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; else the benchmark's own.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of answers to --prompts; 0 is greedy.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that a process answers together.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the answers.")] = 0,
    allow_contaminated: Annotated[
        bool, typer.Option("--allow-contaminated", help="Score models trained on the questions too, and say so.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score without the verdicts that could not be had, and say so.")
    ] = False,
    processes: Annotated[str, typer.Option(help="Processes to start on this machine: a number, or auto.")] = "1",
) -> None:
    """Have models answer benchmarks, a judge compare the answers, and the win rates printed with their errors."""
    from aligndistil.commands.evaluate import Options
    from aligndistil.commands.evaluate import evaluate as run
    from aligndistil.commands.launch import must_start, process_count, start

    options = Options(
        benchmarks=benchmark or (),
        judge=judge,
        out=out,
        repeats=repeat,
        limit=limit,
        data_dir=data_dir,
        against=against,
        prompts=prompts,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        answers=tuple(map(str, answers or ())),
        answers_only=answers_only,
        allow_contaminated=allow_contaminated,
        allow_missing=allow_missing,
    )
    if must_start(processes):
        raise typer.Exit(start(process_count(processes), sys.argv[1:]))
    run(models or (), options)


@app.command()
def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Show this many rows of each stage as tokens.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes the recipe is meant for.")] = 1,
) -> None:
    """Check a recipe without training: keys, values, models, batches and data; with --rows look at rows as tokens."""
    from aligndistil.commands import validate

    loaded = _load(recipe, overrides)
    for line in validate.check(loaded, processes, rows):
        rich.print(line)


@app.command()
def objectives(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the objectives with their data, models and fields."""
    from aligndistil.commands.objectives import objectives_table
    from aligndistil.objectives import registry

    described = [objective.describe() for objective in registry().values()]
    if as_json:
        print(json.dumps(described, indent=2))
    else:
        rich.print(objectives_table(described))


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders or logs, TRL's too; or LABEL=RUN.")],
    metric: Annotated[str | None, typer.Option(help="By default the reward of the policy's samples.")] = None,
    x: Annotated[str, typer.Option("--x", help="step, tokens, seconds, or a metric: kl is the frontier.")] = "step",
    smooth: Annotated[bool, typer.Option(help="Draw moving averages, or what was logged.")] = True,
    window: Annotated[int | None, typer.Option(min=0, help="Steps on either side that are averaged.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Say how long each method takes to reach this value.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf.")] = None,
) -> None:
    """Draw training curves with seed bands, and say how long each method takes to reach the same reward."""
    from aligndistil.report import plot_runs

    for text in plot_runs(runs, metric, x, smooth=smooth, window=window, threshold=threshold, out=out).report():
        rich.print(text)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from aligndistil.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model folder, a Hub id, or builtin:tiny.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A user's message. Repeatable.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    seed: int = 0,
) -> None:
    """Look at a model: sample answers to prompts."""
    from aligndistil.commands.generate import answers

    sampled = answers(model, prompt, samples, seed, max_new_tokens, temperature, top_p)
    for asked, answer, finished in sampled:
        rich.print(f"[bold cyan]{for_console(asked)}[/]\n{for_console(answer)}{'' if finished else ' […]'}\n")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, such as a stage's final/.")],
    out: Annotated[Path, typer.Option(help="Folder of the whole model; it must not be there.")],
) -> None:
    """Make a whole model of an adapter and its base."""
    from aligndistil.commands.merge import merge

    print(printable(str(merge(adapter, out))))


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="A stage's folder, or a run's.", metavar="STAGE_OR_RUN")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="The policy answers it.")] = None,
    row: Annotated[list[int] | None, typer.Option(min=1, help="A row of the eval data, from 1.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page; without it, inspect.html in the stage's folder.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; else the stage's own.")] = None,
    top: Annotated[int, typer.Option(min=1, max=50, help="Likeliest tokens of each model.")] = 6,
    seed: int = 0,
) -> None:
    """Write a page that shows, token by token, what a stage was taught; --prompt and --row may be repeated."""
    from aligndistil import token_view

    page = token_view.inspect(run, token_view.Request(prompt or (), row or (), seed, max_new_tokens), out, top)
    print(printable(str(page)))


@app.command()
def env() -> None:
    """Print versions and devices, for a bug report."""
    from aligndistil.commands.env import environment_report

    print(json.dumps(environment_report(), indent=2))


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from aligndistil.commands import recipes

    rich.print(recipes.recipes_table())


@recipes_app.command("show")
def recipes_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe as YAML with everything in it that it extends, leaves to defaults, or --set changes."""
    from aligndistil.commands import recipes

    print(recipes.resolved_text(_load(recipe, overrides)), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="As `aligndistil recipes ls` shows it.")],
    target: Annotated[Path, typer.Argument(help="Folder to copy to.")] = Path("."),
) -> None:
    """Copy a shipped recipe, with what it extends, to edit it."""
    from aligndistil.commands import recipes

    for path in recipes.copy_recipe(name, target):
        print(printable(str(path)))


def _load(path: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from aligndistil.commands import recipes
    from aligndistil.recipe import load_recipe

    return load_recipe(recipes.find_recipe(path), overrides or ())


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """See `aligndistil COMMAND --help`."""


def _with_home(arguments: list[str]) -> list[str]:
    """With the home folder for `~`, which shells leave alone in `--out=~/x`, `LABEL=~/x` and in quotes."""
    home = os.path.expanduser("~")
    return [
        text if last in ("--prompt", "-p") else re.sub(r"^([\w.-]*=|)~(?=/|$)", lambda found: found[1] + home, text)
        for last, text in zip(["", *arguments], arguments, strict=False)
    ]


def main() -> None:
    """Run the command line; a user's mistake is one sentence and an exit code, a bug keeps its traceback."""
    sys.argv = [sys.argv[0], *_with_home(sys.argv[1:])]
    try:
        end_with_parent()
        with interrupted("stopped; nothing that was learnt is lost: run the same command to go on"):
            app()
    except KeyboardInterrupt:
        sys.exit(EXIT_SIGINT)
    except Exception as error:
        said = error if isinstance(error, UserError) else of_the_system(error)
        if said is None:
            raise
        from aligndistil.commands.launch import report_error

        report_error(said)
        sys.exit(said.exit_code)
