"""What a key of a scenario may be, in words, from the schema that editors get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedcil.scenario import NAME

Schema = Mapping[str, Any]

BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
WORDS = {":": "package.module:name", NAME: "letters, digits, dot, dash, underscore"}


def allowed(key: Schema) -> str:
    """``integer at least 1``, ``"fp32", "bf16"``, and so on; ``key`` is a property of a JSON schema."""
    if "anyOf" in key:
        return " or ".join(allowed(each) for each in key["anyOf"] if each.get("type") != "null")
    if "enum" in key:
        return ", ".join(map(json.dumps, key["enum"]))
    if "$ref" in key:
        return "a table"
    kind = key.get("type", "anything")
    if kind == "string":
        return WORDS.get(key.get("pattern", ""), "text")
    if kind in ("array", "boolean"):
        return {"array": "a list", "boolean": "true, false"}[kind]
    bounds = [f"{word} {key[bound]}" for bound, word in BOUNDS.items() if bound in key]
    return " ".join([kind, *bounds])
