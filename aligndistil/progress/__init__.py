"""How far a long piece of work is: live on a terminal, one plain line every 15 seconds elsewhere.

`Steps` is for anything that is counted, `RunView` for the stages of a run and the training of each.
"""

from aligndistil.progress.steps import Steps, duration
from aligndistil.progress.view import RunView, Training

__all__ = ["RunView", "Steps", "Training", "duration"]
