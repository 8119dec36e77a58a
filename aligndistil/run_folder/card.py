"""The model card: README.md of a trained model's folder."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from aligndistil.files import write_text

if TYPE_CHECKING:
    from aligndistil.objectives.base import MetricInfo

CARD = "README.md"
TEMPLATE = """\
---
{{ header }}---

# {{ name }}

A {{ kind }} trained with aligndistil from `{{ base_model }}`.

| | |
|---|---|
| base model | `{{ base_model }}` |
{%- if initial != base_model %}
| initial model | `{{ initial }}` |
{%- endif %}
| objective | `{{ objective }}` |
| method | {{ paper }} |
{%- for role, model in models.items() %}
| {{ role }} | `{{ model }}`{% if held[role] %}: {{ held[role] }}{% endif %} |
{%- endfor %}
| training data | {{ data }} |
{% if figures %}
## At the end of training

| | value | measured in |
|---|---|---|
{%- for figure in figures %}
| {{ figure | join(" | ") }} |
{%- endfor %}
{% endif %}
## Use

```python
{%- if held %}
from peft import PeftModel
{%- endif %}
from transformers import {{ loader }}, AutoTokenizer
{% if held %}
base = {{ loader }}.from_pretrained("{{ initial }}"{% if scalar %}, num_labels=1{% endif %})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
{%- else %}
model = {{ loader }}.from_pretrained("path/to/this/folder")
{%- endif %}
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{%- if held %}

`aligndistil merge path/to/this/folder --out FOLDER` makes a whole model of it.
{%- endif %}

## Recipe

{{ fence }}yaml
{{ recipe }}
{{ fence }}

## Versions

| package | version |
|---|---|
{%- for package, version in versions.items() %}
| {{ package }} | {{ version }} |
{%- endfor %}
"""
_COMPARISON = re.compile(r"^## Comparison\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_FIRST_SECTION = re.compile(r"^(?=## )|\Z", re.MULTILINE)


def model_card(
    *,
    name: str,
    base_model: str,
    initial: str,
    license: Mapping[str, str],
    objective: str,
    scalar: bool,
    on_policy: bool,
    paper: str,
    models: Mapping[str, str],
    held: Mapping[str, str] = MappingProxyType({}),
    data: Sequence[str],
    metrics: Mapping[str, float],
    headline: Mapping[str, MetricInfo],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str | None],
) -> str:
    """Markdown with the metadata block that the Hub reads.

    `base_model` is what the stage started from, `initial` what its training goes back to through other stages,
    `license` what `license_of` found. `scalar`: the model has one output, not a vocabulary. `models` are the frozen
    ones by role, `held` what each model is where adapters were trained and empty elsewhere, `data` the paths of the
    training sources. Of `metrics`, the last of training and (as eval/...) of evaluations, those of `headline` are
    shown. `recipe` is the resolved stage as plain YAML values.

    Only what looks like a Hub id enters the metadata: a local path there would be refused by the Hub.
    """
    metadata = {
        "library_name": "peft" if held else "transformers",
        "pipeline_tag": "text-classification" if scalar else "text-generation",
        "base_model": hub_id(base_model) or hub_id(initial),
        "base_model_relation": "adapter" if held and (hub_id(base_model) or hub_id(initial)) else "",
        "datasets": list(dict.fromkeys(filter(None, map(hub_id, data)))),
        **license,
        "tags": list(dict.fromkeys(["aligndistil", objective])),
    }
    kind = "reward model (a sequence classifier with one output)" if scalar else "causal language model"
    recipe_text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120).rstrip()
    # The code fence is longer than any in the text: a chat template may hold one.
    longest_fence = max((len(run) for run in re.findall(r"`{3,}", recipe_text)), default=2)
    card: str = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        header=_header({key: value for key, value in metadata.items() if value}),
        name=name,
        kind=("LoRA adapter: a " if held else "") + kind,
        scalar=scalar,
        held={role.replace("_", " "): what for role, what in held.items()},
        loader="AutoModelForSequenceClassification" if scalar else "AutoModelForCausalLM",
        base_model=base_model,
        initial=initial,
        objective=objective,
        paper=paper,
        models={role.replace("_", " "): model for role, model in models.items()},
        data=", ".join(f"`{source}`" for source in data),
        figures=_figures(metrics, headline, on_policy=on_policy),
        recipe=recipe_text,
        fence="`" * (longest_fence + 1),
        versions={package: version for package, version in versions.items() if version is not None},
    )
    return card


def add_comparison(final: Path, markdown: str) -> None:
    """Put a comparison, or a newer one, into the card of the model in `final`, as its section `## Comparison`.

    `markdown` is what stands below that heading; its own headings are of the third level or lower. Everything else in
    the card stays as it is, and a folder without a card stays without one. The file is replaced in one step.
    """
    card = final / CARD
    if not card.is_file():
        return
    text, section = card.read_text(encoding="utf-8"), f"## Comparison\n\n{markdown.strip()}\n\n"
    place = _COMPARISON if _COMPARISON.search(text) else _FIRST_SECTION
    write_text(card, place.sub(lambda _: section, text, count=1).rstrip() + "\n")


def license_of(model: str, revision: str | None = None) -> dict[str, str]:
    """What the card of a model says of its licence, in the Hub's terms; empty where there is no such card at hand.

    `model` is a folder, or a Hub id, a copy of whose card may be in the cache. Nothing is guessed, and where nothing is
    known the Hub's `other` is not said either: it means terms of their own, with a name and a text.
    """
    from huggingface_hub import metadata_load, try_to_load_from_cache

    card: object = Path(model) / CARD
    try:
        if not Path(model).is_dir():
            card = try_to_load_from_cache(model, CARD, revision=revision)
        metadata = metadata_load(card) if isinstance(card, str | Path) and Path(card).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file: it must not fail a finished training
        return {}
    found = {key: (metadata or {}).get(key) for key in ("license", "license_name", "license_link")}
    if not str(found["license_link"]).startswith("https://"):
        del found["license_link"]  # a file of that folder, which is not in this one
    return {key: value for key, value in found.items() if isinstance(value, str)} if found["license"] else {}


def hub_id(path: str) -> str | None:
    """OWNER/NAME of a recipe's path, without a revision; None for what is not on the Hub, as far as its name says."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name = path.partition("@")[0]
    data_file = name.endswith((".json", ".jsonl", ".parquet", ".csv", ".gz"))
    if name.count("/") != 1 or data_file or Path(path).exists() or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _header(metadata: Mapping[str, str | list[str]]) -> str:
    """YAML with every string in quotes: readers of YAML 1.1 and 1.2 disagree on some plain ones, `no` and `1e3`."""

    def quoted(value: str | list[str]) -> Any:
        return DoubleQuotedScalarString(value) if isinstance(value, str) else [quoted(one) for one in value]

    writer, text = YAML(), io.StringIO()
    writer.width = 4096
    writer.dump({key: quoted(value) for key, value in metadata.items()}, text)
    return text.getvalue()


def _figures(
    metrics: Mapping[str, float], headline: Mapping[str, MetricInfo], *, on_policy: bool
) -> list[tuple[str, str, str]]:
    """What each metric is, its value with its unit, and where that is from: an evaluation rather than a step.

    What says something of the policy only on its own samples is of steps that sample: an evaluation is on given
    responses.
    """
    rows = []
    for name, info in headline.items():
        evaluated = f"eval/{name}" in metrics and not info.on_samples
        value = metrics.get(f"eval/{name}" if evaluated else name)
        if value is not None and (on_policy or not info.on_samples):
            rows.append(
                (
                    info.title or f"`{name}`",
                    _with_unit(value, info.unit),
                    "the last evaluation" if evaluated else "the last line of the training log",
                )
            )
    return rows


def _with_unit(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    scale = re.match(r"-?\d", unit) is not None  # "-1 to 1"
    return f"{value:.3g} ({unit})" if scale else f"{value:.3g} {unit}".rstrip()
