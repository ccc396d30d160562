"""A part of a scenario: a frozen value that refuses unknown keys, wrong types and non-finite numbers."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """One table of the scenario file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _arrays(cls, value: Any, info: ValidationInfo) -> Any:
        """TOML has arrays only; strict mode would refuse them where a tuple is wanted."""
        field = cls.model_fields[str(info.field_name)]
        return _as_tuple(value) if _may_be_tuple(field.annotation) else value

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

    def doubts(self) -> list[str]:
        """Keys that were set and do nothing beside others, or hardly what was meant."""
        return []


def _names(section: type[Section]) -> frozenset[str]:
    """The shipped ones that a section's ``name`` chooses from."""
    said = section.model_json_schema()["properties"].get("name", {})
    return frozenset(next((part["enum"] for part in (said, *said.get("anyOf", ())) if "enum" in part), ()))


def _may_be_tuple(annotation: Any) -> bool:
    """Itself, or one of what it is a union of."""
    origin = get_origin(annotation)
    return origin is tuple or (origin in WRAPPERS and any(map(_may_be_tuple, get_args(annotation))))


WRAPPERS = (Annotated, Union, UnionType)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


Ints = tuple[int, ...]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Above0 = Annotated[float, Field(gt=0.0)]
