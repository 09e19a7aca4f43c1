"""The part of JSON Schema that weights_manifest.schema.json uses, to hold it against manifest/schema.py."""

from __future__ import annotations

import re
from typing import Any

KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "type", "additionalProperties", "required"),
    *("properties", "items", "minItems", "maxItems", "minLength", "minimum", "pattern", "enum", "const"),
    *("anyOf", "allOf", "if", "then", "else"),
}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}


def fits(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Whether a value is what the schema says; a keyword that is not known here is a KeyError."""
    if isinstance(schema, bool):
        return schema
    if unknown := set(schema) - KNOWN:
        raise KeyError(unknown)
    if "$ref" in schema and not fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "type" in schema:
        kind = TYPES[schema["type"]]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return False
    if "const" in schema and (type(value) is not type(schema["const"]) or value != schema["const"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(fits(value, one, root) for one in schema["anyOf"]):
        return False
    if not all(fits(value, one, root) for one in schema.get("allOf", [])):
        return False
    if "if" in schema:
        branch = "then" if fits(value, schema["if"], root) else "else"
        if not fits(value, schema.get(branch, True), root):
            return False
    if isinstance(value, str):
        pattern = schema.get("pattern", "^").replace("$", r"\Z")
        return re.search(pattern, value) is not None and len(value) >= schema.get("minLength", 0)
    if isinstance(value, list):
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return size and all(fits(one, schema.get("items", True), root) for one in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if not set(schema.get("required", [])) <= set(value):
            return False
        if schema.get("additionalProperties", True) is False and not set(value) <= set(known):
            return False
        return all(fits(one, known.get(name, True), root) for name, one in value.items())
    return not isinstance(value, int) or value >= schema.get("minimum", value)
