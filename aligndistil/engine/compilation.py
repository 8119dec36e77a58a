"""Whether `torch.compile` works here: it needs a compiler of the system's, which not every machine has."""

from __future__ import annotations

import functools
import logging

import torch

from aligndistil import recipe
from aligndistil.errors import MissingError

logger = logging.getLogger(__name__)


def compiles_head(settings: recipe.Engine, device: torch.device) -> bool:
    """Whether what happens to logits is compiled: asked for, or on a GPU, where it is several times faster.

    Raises MissingError when it is asked for and cannot be done.
    """
    if settings.compile == "never" or (settings.compile == "auto" and device.type != "cuda"):
        return False
    if not (why := _cannot_compile(device)):
        return True
    if settings.compile != "auto":
        raise MissingError(
            f"engine.compile: torch.compile does not work here ({why}); install a C++ compiler, or write `never`"
        )
    logger.warning("the head is not compiled, and slower for it: torch.compile does not work here (%s)", why)
    return False


def forget_kernels() -> None:
    """Begin anew, as a process that resumes does: so many kernels of one function, and torch goes on without them."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64


@functools.cache
def _cannot_compile(device: torch.device) -> str:
    """Why not, or nothing."""
    try:
        torch.compile(lambda x: (x.exp() + 1).sum(-1))(torch.ones(4, 8, device=device))
    except Exception as error:  # whatever the compilers of all systems raise
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""
