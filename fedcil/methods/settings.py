"""What every method's ``[method]`` table has, and what a scenario may ask a method before it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from fedcil.section import Section

if TYPE_CHECKING:
    from fedcil.compute import Compute
    from fedcil.methods.base import Method
    from fedcil.models import Architecture
    from fedcil.stream import Task
    from fedcil.tensors import Tensors


class ExtraImages(NamedTuple):
    """Of a method, beyond those of a client's batch."""

    kept: int = 0  # by a process
    in_step: int = 0  # of a client, beside a batch of real ones
    at_boundary: int = 0  # in a step on the server


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

    def extra_images(self, real: int, task: Task) -> ExtraImages:
        """Beyond steps of ``real`` images: for the prediction of memory alone."""
        return ExtraImages()

    def payload_bytes(self, model: Tensors, compute: Compute) -> int:
        """Bytes of what a boundary after ``model`` hands to each later client, as far as ``fedcil plan`` can know."""
        return 0

    def build(self) -> Method:
        """The frozen value of functions that this method is (fedcil/methods/base.py)."""
        raise TypeError(f"{type(self).__name__} has no build()")
