"""The keys of a scenario file as tables for people, from the same schema that editors get."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fedcil.allowed import Schema, allowed
from fedcil.method_table import method_settings
from fedcil.methods import METHODS
from fedcil.scenario import scenario_schema

HEAD = """# Every key of a scenario file

Written by `fedcil schema --tables`. A key that is left out has its default, one that has none is not set;
`fedcil run SCENARIO --set training.rounds=20` changes one. What is not allowed is refused before anything is computed.
A key whose description begins with names (`shards: ...`) is for these values of the table's `name` alone; set
under another, it does nothing, and `plan` and `run` say so.
"""
COLUMNS = "| key | default | allowed | what it is |\n|---|---|---|---|"
METHOD = """## `[method]`

`name`, which must be given: one of the methods below, with its options, or your own as `package.module:Class`.
`preset`: a name for values of options that are not given; presets stand below their method.
"""


def reference() -> str:
    return "\n".join([HEAD, *_tables(scenario_schema())]).rstrip("\n")


def _tables(schema: Schema) -> Iterator[str]:
    parts, keys = schema["$defs"], schema["properties"]
    sections = {name: parts[key["$ref"].split("/")[-1]] for name, key in keys.items() if "$ref" in key}
    yield from _table("The run", {name: key for name, key in keys.items() if name not in {*sections, "method"}})
    for name, part in sections.items():
        yield from _table(f"`[{name}]`", part["properties"], part["description"].partition(": ")[2])
    yield METHOD
    for name, part in zip(METHODS, keys["method"]["oneOf"], strict=False):  # the last one is a person's own
        options = {key: value for key, value in part["properties"].items() if key not in ("name", "preset")}
        yield from _table(f'`[method]` with `name = "{name}"`', options, "" if options else "No options.")
        for preset, values in method_settings(name).presets.items():
            yield (
                f'`preset = "{preset}"`: ' + ", ".join(f"{key} = {_toml(item)}" for key, item in values.items()) + "\n"
            )


def _table(title: str, keys: Schema, what: str = "") -> Iterator[str]:
    yield f"## {title}\n"
    if what:
        yield what[0].upper() + what[1:] + "\n"
    if keys:
        yield COLUMNS
        for name, key in keys.items():
            yield f"| {name} | {_toml(key.get('default'))} | {allowed(key)} | {key['description']} |"
        yield ""


def _toml(value: object) -> str:
    return "" if value is None else json.dumps(value)
