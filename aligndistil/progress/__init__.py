"""How far a long piece of work is: live on a terminal, one plain line every 15 seconds elsewhere.

`Steps` is for anything that is counted, `RunView` for the stages of a run and the training of each; a console that is
lost stops neither.
"""

from aligndistil.progress.lost_console import console_may_be_lost
from aligndistil.progress.steps import Steps, duration
from aligndistil.progress.view import RunView, Training

__all__ = ["RunView", "Steps", "Training", "console_may_be_lost", "duration"]
