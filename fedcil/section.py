"""A part of a scenario: a frozen value that refuses unknown keys, wrong types and non-finite numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict


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
