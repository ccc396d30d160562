"""Scenario files: finding, reading, overriding, writing, and saying what is wrong with one.

Precedence: default < preset < file < ``--set``. Every problem found is in the one error raised, with the file, the key,
what was given, what is allowed, and the nearest valid name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import PydanticInvalidForJsonSchema, ValidationError

from fedcil.allowed import allowed
from fedcil.errors import ScenarioError, did_you_mean
from fedcil.method_table import OWN_CODE, UnreadMethod, method_settings, read_method
from fedcil.scenario import Scenario
from fedcil.section import Section

PYDANTIC_SAYS = "Input should be "
FOLLOWS = "default_factory_not_called"  # a problem that another one makes
SHIPPED = Path(__file__).resolve().parent.parent / "scenarios"


def shipped_scenarios() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.rglob("*.toml"))


def load_scenario(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario from a path, a shipped name or a mapping and lay ``key=value`` overrides over it."""
    overrides = overrides if isinstance(overrides, str | Mapping) else list(overrides or ())
    if isinstance(overrides, str | Mapping) or not all(isinstance(text, str) for text in overrides):
        example = '["training.rounds=20", "seed=1"]'
        raise ScenarioError(f"{overrides!r:.100} is no list of overrides", where="overrides", allowed=f"like {example}")
    if isinstance(source, Mapping):
        return parse_scenario(_as_table(source), overrides, where="scenario")
    if not isinstance(source, str | Path):
        kinds = "a Scenario, a path, a shipped name, or a mapping"
        raise ScenarioError(f"{source!r:.100} is no scenario", where="scenario", allowed=kinds)
    path = find_scenario(source)
    return parse_scenario(_read_toml(path), overrides, where=str(path))


def _as_table(source: Mapping[Any, Any]) -> dict[str, Any]:
    """Mappings of any kind as TOML has them."""
    if odd := [key for key in source if not isinstance(key, str)]:
        raise ScenarioError(f"{odd[0]!r:.100} is no name of a key", where="scenario", allowed="text")
    return {key: _as_table(value) if isinstance(value, Mapping) else value for key, value in source.items()}


def read_scenario(path: Path) -> Scenario:
    """Of a run that is there: also where a person's own method cannot be loaded. It can be read then, not run."""
    table = _read_toml(path)
    method = table.get("method")
    if isinstance(method, dict) and ":" in str(method.get("name")):
        try:
            table["method"] = read_method(method)
        except ValueError:
            table["method"] = UnreadMethod.model_construct(**method)
    return parse_scenario(table, where=str(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of 5000 digits, 1000 brackets
        raise ScenarioError(f"not a TOML file: {error}", where=str(path), next="mend the line that is named") from None
    except OSError as error:
        raise ScenarioError(f"cannot be read: {error.strerror}", where=str(path)) from None


def find_scenario(source: str | Path) -> Path:
    """A path as it is, or the file of a shipped name."""
    given = Path(source)
    if _kind(given) == "file":
        return given
    shipped = SHIPPED / f"{given}.toml"
    if not given.is_absolute() and ".." not in given.parts and _kind(shipped) == "file":
        return shipped
    folder = ": it is a folder" if _kind(given) == "folder" else ""
    known = [*shipped_scenarios(), *(path.name for path in Path().glob("*.toml"))]
    raise ScenarioError(
        f"no scenario {str(source)!r}{folder}{did_you_mean(str(source), known)}",
        where=str(source),
        allowed="a path to a TOML file, or one of: " + ", ".join(shipped_scenarios()),
        next="`fedcil list scenarios` shows what is shipped",
    )


def _kind(path: Path) -> str:
    """file, folder or nothing; what no file system takes as a name is nothing."""
    try:
        return "file" if path.is_file() else "folder" if path.is_dir() else "nothing"
    except OSError:
        return "nothing"


def parse_scenario(table: dict[str, Any], overrides: Sequence[str] = (), *, where: str) -> Scenario:
    """Check a parsed table with its overrides; every problem found is in the one error raised."""
    if overrides:
        table = deepcopy(table)
    for override in overrides:
        _override(table, override)
    _refuse_unwritable(table, (), where)
    try:
        return Scenario.model_validate(table)
    except ValidationError as error:
        found = [problem for problem in error.errors() if problem["type"] != FOLLOWS]
        problems = [_explain(problem, table) for problem in found]
        raise ScenarioError(
            "\n".join(text for text, _ in problems),
            where=where + (", with " + " ".join(f"--set {text}" for text in overrides) if overrides else ""),
            allowed="; ".join(dict.fromkeys(text for _, text in problems if text)),
            next=next((each["ctx"]["next"] for each in found if each["type"] == OWN_CODE), _way_out(overrides)),
        ) from None


def _way_out(overrides: Sequence[str]) -> str:
    """Options and presets are of one method, so another one needs a table of its own."""
    renamed = next((text for text in overrides if text.replace(" ", "").startswith("method.name=")), None)
    if renamed:
        name = renamed.partition("=")[2].strip(" '\"")
        return f"another method replaces the whole table: --set 'method={{name = \"{name}\"}}'"
    return "`fedcil schema --tables` prints every key, what it may be, and what it is"


def _refuse_unwritable(value: Any, keys: tuple[str, ...], where: str) -> None:
    """The run folder keeps the scenario as a TOML file, and that holds Unicode text and integers of 64 bits."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_unwritable(item, (*keys, str(key)), where)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_unwritable(item, keys, where)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ScenarioError(f"{'.'.join(keys)} is too large a number", where=where, allowed="integers of 64 bits")
    elif isinstance(value, str) and not _is_unicode(value):
        raise ScenarioError(f"{'.'.join(keys)} = {value!r} is no text", where=where, allowed="Unicode text")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _override(table: dict[str, Any], text: str) -> None:
    """Lay ``a.b=value`` over ``table``. The value is TOML; a bare word is a string."""
    path, equals, raw = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ScenarioError(f"--set {text!r} is not key=value", where="--set", allowed="for example training.rounds=20")
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ScenarioError(f"--set {text!r}: {key} is a value, not a table", where="--set")
    table[keys[-1]] = _toml_value(raw.strip())


def _toml_value(raw: str) -> Any:
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return table["value"] if len(table) == 1 else raw  # a second line would be a second key


def _explain(problem: Any, table: Mapping[str, Any]) -> tuple[str, str]:
    """One pydantic problem as (what was wrong, what is allowed), with the nearest valid key."""
    keys = [str(part) for part in problem["loc"]]
    given = problem["input"]
    kind = problem["type"]
    if kind == "extra_forbidden":
        *above, key = keys
        valid = list(_section(above, table).model_fields)
        elsewhere = [f"{table}.{key}" for table, kind in _tables() if key in kind.model_fields and not above]
        hint = f" (did you mean {' or '.join(elsewhere)}?)" if elsewhere else did_you_mean(key, valid)
        return (
            f"unknown key {'.'.join(keys)}{hint}",
            f"keys of {'.'.join(above) or 'a scenario'}: {', '.join(valid)}",
        )
    place = ".".join(key for key in keys if not _is_type_tag(key)) or "scenario"
    if kind == "missing":
        return f"{place} is missing", _allowed_at(keys, table)
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, Mapping | Section) else f" = {given!r:.200}"
    hint = did_you_mean(str(given), [word for word in re.findall(r"'([^']+)'", message) if word not in str(given)])
    if kind in ("value_error", OWN_CODE):
        return f"{place}{shown}: {message}{hint}", ""
    said = message.removeprefix(PYDANTIC_SAYS) if message.startswith(PYDANTIC_SAYS) and kind != "model_type" else ""
    said = said.replace("a valid tuple", "a list")  # TOML has no other
    return f"{place}{shown} {f'must be {said}' if said else 'is not allowed'}{hint}", _allowed_at(keys, table)


def _allowed_at(keys: Sequence[str], table: Mapping[str, Any]) -> str:
    """What may stand in this place, and what it is; in a list, or a branch of a union, what may stand for the whole."""
    *above, key = keys[:2]
    try:
        what = _section(above, table).model_json_schema()["properties"][key]
    except PydanticInvalidForJsonSchema:  # a person's own method may have options of any type
        return ""
    described = f" ({what['description']})" if "description" in what else ""
    return f"{'.'.join([*above, key])}: {allowed(what)}{described}"


def _tables() -> list[tuple[str, type[Section]]]:
    """Of a scenario, but for the method's, whose keys depend on its name."""
    kinds = [(name, field.annotation) for name, field in Scenario.model_fields.items() if name != "method"]
    return [(name, kind) for name, kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _is_type_tag(part: str) -> bool:
    """Pydantic puts the branch of a union into the place; it is no key of the file."""
    return "[" in part or part.startswith(("literal", "tuple"))


def _section(keys: Sequence[str], table: Mapping[str, Any]) -> type[Section]:
    """The class of a table of the scenario; of the scenario itself without keys."""
    if list(keys) == ["method"]:
        return method_settings(table["method"]["name"])
    section: type[Section] = Scenario
    for key in keys:
        section = section.model_fields[key].annotation  # type: ignore[assignment]
    return section


def to_toml(scenario: Scenario) -> str:
    """The scenario as a TOML file that gives the same scenario again (without the data root). ScenarioError for options
    of a person's own method that TOML has no words for.
    """
    plain = scenario.to_dict()
    plain["data"].pop("root", None)
    try:
        text = tomli_w.dumps(plain)
        again = parse_scenario(tomllib.loads(text), where="").to_dict()
        problem = f"{plain['method']} would become {again['method']}" if again != plain else ""
    except (TypeError, ScenarioError) as error:
        problem = error.what if isinstance(error, ScenarioError) else str(error)
    if problem:
        raise ScenarioError(
            f"an option cannot be written into the run folder: {problem}",
            where="method",
            allowed="text, numbers, booleans, and lists and tables of these, without None inside",
            next="give the option another form",
        )
    return text
