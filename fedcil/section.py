"""A part of a scenario: a frozen value that refuses unknown keys, wrong types and non-finite numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, Strict

if TYPE_CHECKING:
    from fedcil.compute import Compute
    from fedcil.messages import Tensors
    from fedcil.methods.base import Method
    from fedcil.models import Architecture
    from fedcil.stream import Task


class Section(BaseModel):
    """One table of the scenario file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# TOML has arrays only; strict mode would refuse them where a tuple is wanted.
Ints = Annotated[tuple[int, ...], Strict(False)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Above0 = Annotated[float, Field(gt=0.0)]


class MethodSettings(Section):
    """The ``[method]`` table: a method's name, its preset and its own options.

    A subclass adds its options as fields, may list presets (a name -> values for those fields), and says
    in ``build`` which functions make up the method. That is all there is to a method.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    either_or: ClassVar[tuple[frozenset[str], ...]] = ()  # options of which one is given: it replaces a preset's other

    name: str
    preset: str | None = Field(None, description="values for options that are not given")

    def check_model(self, architecture: Architecture) -> None:
        """Raise ScenarioError if the method cannot work with this classifier or with images of its size."""

    def extra_images(self, real: int, task: Task) -> tuple[int, int]:
        """(images kept in memory, images added to a step of ``real`` ones): for the prediction of memory alone."""
        return 0, 0

    def payload_bytes(self, model: Tensors, compute: Compute) -> int:
        """Bytes of what a boundary after ``model`` hands to each later client, as far as ``fedcil plan`` can know."""
        return 0

    def build(self) -> Method:
        """The frozen value of functions that this method is (fedcil/methods/base.py)."""
        raise TypeError(f"{type(self).__name__} has no build()")
