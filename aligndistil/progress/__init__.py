"""How far a long piece of work is: live on a terminal, one plain line every 15 seconds elsewhere.

`Steps` is a bar for anything that is counted; `TrainingProgress` is one stage's training; `RunView` is what a terminal
shows around it: the stages of the recipe, what each of them starts from, and how far they are.
"""

from aligndistil.progress.steps import Steps, duration, track
from aligndistil.progress.training import SHOWN, TrainingProgress
from aligndistil.progress.view import RunView

__all__ = ["SHOWN", "RunView", "Steps", "TrainingProgress", "duration", "track"]
