"""The STAND-IN's tools: what a template gets of those that a request names."""

from __future__ import annotations

from typing import Any


class RefusalError(Exception):
    """The server refuses a request: HTTP status and text."""


def tools_as_passed_on(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep of each tool the keys that the server knows, in its order.

    Raises:
        RefusalError: a tool has no parameters.
    """
    return [{"type": tool["type"], "function": _function(tool["function"])} for tool in tools]


def _function(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {}
    if not isinstance(parameters.get("properties"), dict):
        raise RefusalError(400, "properties must be an object")
    kept = {
        "type": parameters.get("type", ""),
        "$defs": _sorted(parameters.get("$defs")),
        "required": parameters.get("required"),
        "properties": {name: _property(value) for name, value in parameters["properties"].items()},
    }
    described = {"name": function["name"], "description": function.get("description", "")}
    return described | {"parameters": {key: kept[key] for key in kept if kept[key] or key in ("type", "properties")}}


def _property(value: dict[str, Any]) -> dict[str, Any]:
    kept = {
        "anyOf": [_property(entry) for entry in value.get("anyOf", [])],
        "type": value.get("type"),
        "items": _sorted(value.get("items")),
        "description": value.get("description"),
        "enum": value.get("enum"),
        "properties": {name: _property(inner) for name, inner in value.get("properties", {}).items()},
    }
    return {key: entry for key, entry in kept.items() if entry}


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return list(map(_sorted, value)) if isinstance(value, list) else value
