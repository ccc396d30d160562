"""The ``[method]`` table: its options are those of the named method's settings class, loaded only then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args, get_origin

from pydantic_core import PydanticCustomError

from fedcil.dotted import load_dotted
from fedcil.errors import ScenarioError, did_you_mean
from fedcil.methods import METHODS
from fedcil.methods.settings import MethodSettings

OWN_CODE = "own_code"
"""Type of a problem whose way out (``next``) is in its context: a module that cannot be loaded."""


class UnreadMethod(MethodSettings, extra="allow"):
    """The settings of a person's own method whose module is not at hand: as they stand in a run's folder."""


def read_method(value: object) -> object:
    """Lay the preset under the given options and let the named method's settings class check them."""
    if isinstance(value, MethodSettings):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"needs a name; allowed: {', '.join(METHODS)}")
    settings = method_settings(value["name"])
    _refuse_another_name(settings, value["name"])
    preset = value.get("preset")
    if preset is None:
        return settings.model_validate(dict(value))
    if not isinstance(preset, str) or preset not in settings.presets:
        allowed = ", ".join(settings.presets) or "this method has no presets"
        hint = did_you_mean(str(preset), settings.presets)
        raise ValueError(f"unknown preset {preset!r}; allowed: {allowed}{hint}")
    replaced = {name for group in settings.either_or if group & value.keys() for name in group}
    kept = {name: item for name, item in settings.presets[preset].items() if name not in replaced}
    return settings.model_validate({**kept, **value})


def _refuse_another_name(settings: type[MethodSettings], name: str) -> None:
    """A class that is derived from a shipped method's has that method's name, if it does not say otherwise."""
    shipped = settings.model_fields["name"].annotation
    if get_origin(shipped) is Literal and name not in get_args(shipped):
        raise ValueError(f"its class is derived from that of {get_args(shipped)[0]!r}: give it a line `name: str`")


def method_settings(name: str) -> type[MethodSettings]:
    """The settings class of a method, by its name in the table or as ``package.module:Class``."""
    target = METHODS.get(name, name)
    if ":" not in target:
        raise ValueError(
            f"unknown method {name!r}; allowed: {', '.join(METHODS)}, or your own as package.module:Class"
            + did_you_mean(name, METHODS)
        )
    try:
        loaded = load_dotted(target, "method.name")
    except ScenarioError as error:
        raise PydanticCustomError(OWN_CODE, "{what}", {"what": error.what, "next": error.next}) from None
    if not (isinstance(loaded, type) and issubclass(loaded, MethodSettings)):
        raise ValueError(f"{target} is not a class of method settings (fedcil.methods.settings.MethodSettings)")
    return loaded
