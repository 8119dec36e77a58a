"""The model card: README.md of a trained model's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A {{ kind }} trained with aligndistil from `{{ base_model }}`.

| | |
|---|---|
| base model | `{{ base_model }}` |
| objective | `{{ objective }}` |
| method | {{ paper }} |
{%- for role, model in models.items() %}
| {{ role }} | `{{ model }}` |
{%- endfor %}
| training data | {{ data }} |

## Use

```python
from transformers import {{ loader }}, AutoTokenizer

model = {{ loader }}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{% if metrics %}
## Metrics

The last values of the training stage, as it logged them.

| metric | value |
|---|---|
{%- for metric, value in metrics %}
| `{{ metric }}` | {{ value }} |
{%- endfor %}
{% endif %}
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


def model_card(
    *,
    name: str,
    base_model: str,
    objective: str,
    scalar: bool,
    paper: str,
    models: Mapping[str, str],
    data: Sequence[str],
    metrics: Mapping[str, float],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str | None],
) -> str:
    """Markdown with the metadata block that the Hub reads.

    `scalar`: the model has one output, not a vocabulary. `models` are the frozen ones by role, `data` the paths of the
    training sources, `recipe` the resolved stage as plain YAML values. Only what looks like a Hub id enters the
    metadata: a local path there would be refused by the Hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = base_model.partition("@")[0]  # the Hub links to models, not to their revisions
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[source for source in data if is_hub_id(source)] or None,
        library_name="transformers",
        pipeline_tag="text-classification" if scalar else "text-generation",
        tags=list(dict.fromkeys(["aligndistil", objective])),
    )
    recipe_text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120).rstrip()
    # The code fence is longer than any in the text: a chat template may hold one.
    longest_fence = max((len(run) for run in re.findall(r"`{3,}", recipe_text)), default=2)
    card = ModelCard.from_template(
        metadata,
        template_str=TEMPLATE,
        name=name,
        kind="reward model (a sequence classifier with one output)" if scalar else "causal language model",
        loader="AutoModelForSequenceClassification" if scalar else "AutoModelForCausalLM",
        base_model=base_model,
        objective=objective,
        paper=paper,
        models={role.replace("_", " "): model for role, model in models.items()},
        data=", ".join(f"`{source}`" for source in data),
        metrics=[(metric, f"{value:.6g}") for metric, value in metrics.items()],
        recipe=recipe_text,
        fence="`" * (longest_fence + 1),
        versions={package: version for package, version in versions.items() if version is not None},
    )
    return str(card)


def is_hub_id(path: str) -> bool:
    """Whether a path of a recipe is `owner/name` on the Hub, as far as the name says."""
    data_file = path.endswith((".json", ".jsonl", ".parquet", ".csv", ".gz"))
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not data_file and not Path(path).exists()
