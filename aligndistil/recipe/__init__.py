"""What the user wrote, checked before any weight is loaded.

`yaml_positions` reads the file; `layers` lays files, defaults, stages and `--set` over each other; `sections` says what
may be written, and `stage` what the sections of a stage demand of each other; `problems` and `other_tools` find the
words for what is wrong; `load` runs it all, and checks what concerns several stages.
"""

from aligndistil.recipe.fingerprint import changed_sections, stage_fingerprint
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
    Lora,
    Model,
    Report,
    Rollout,
    Source,
    Train,
)
from aligndistil.recipe.stage import CODE, Recipe, Stage, stage_of

__all__ = [
    "CODE",
    "OWNED_DEEPSPEED_KEYS",
    "Checkpoint",
    "Data",
    "Engine",
    "Evaluation",
    "Format",
    "Logging",
    "Lora",
    "Model",
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
