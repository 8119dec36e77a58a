"""What the user wrote, checked before any weight is loaded.

`yaml_positions` reads the file, `merging` and `overrides` lay files, defaults, stages and `--set` over each other,
`sections` says what may be written, `checks` and `graph` what must fit together, `describe` and `peers` find the words
for what does not, and `load` runs it all.
"""

from aligndistil.recipe.checks import CODE
from aligndistil.recipe.fingerprint import changed_sections, stage_fingerprint
from aligndistil.recipe.graph import stage_of
from aligndistil.recipe.header import Report
from aligndistil.recipe.load import load_recipe
from aligndistil.recipe.schema import recipe_schema
from aligndistil.recipe.sections import (
    OWNED_DEEPSPEED_KEYS,
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Format,
    Logging,
    Model,
    Models,
    Rollout,
    Source,
    Train,
)
from aligndistil.recipe.stage import Recipe, Stage

__all__ = [
    "CODE",
    "OWNED_DEEPSPEED_KEYS",
    "Checkpoint",
    "Data",
    "Engine",
    "Evaluation",
    "Format",
    "Logging",
    "Model",
    "Models",
    "Recipe",
    "Report",
    "Rollout",
    "Source",
    "Stage",
    "Train",
    "changed_sections",
    "load_recipe",
    "recipe_schema",
    "stage_fingerprint",
    "stage_of",
]
