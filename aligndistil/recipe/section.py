"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Text: TypeAlias = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Closed and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def refusal(at: str, text: str) -> PydanticCustomError:
    """An error about one field of several that belong together."""
    return PydanticCustomError("refused", "{text}", {"at": at, "text": text})
