"""A part of a scenario: a frozen value that refuses unknown keys, wrong types and non-finite numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

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

    def idle(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """This ``name``, a key that was set and does nothing under it, and the names that it is for; each such key.

        The description of such a key begins with those names (``shards: ...``); a person's own code may use any key.
        """
        name, names, fields = getattr(self, "name", None), _names(type(self)), type(self).model_fields
        if name not in names:
            return []
        of = {key: tuple((field.description or "").split(":")[0].split(", ")) for key, field in fields.items()}
        set_ = [key for key, field in fields.items() if getattr(self, key) != field.default]
        return [(name, key, of[key]) for key in set_ if names.issuperset(of[key]) and name not in of[key]]


def _names(section: type[Section]) -> frozenset[str]:
    """The shipped ones that a section's ``name`` chooses from."""
    said = section.model_json_schema()["properties"].get("name", {})
    return frozenset(next((part["enum"] for part in (said, *said.get("anyOf", ())) if "enum" in part), ()))


# TOML has arrays only; strict mode would refuse them where a tuple is wanted.
Ints = Annotated[tuple[int, ...], Strict(False)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Above0 = Annotated[float, Field(gt=0.0)]


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
