"""The nearest right key or value for a wrong one."""

import difflib
import zoneinfo
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from functions.spec import NAME_PATTERN, FunctionSpec


def hint_for(details: ErrorDetails) -> str | None:
    """Return what the author probably meant, or None."""
    path, value, kind = details["loc"], details["input"], details["type"]
    if kind == "extra_forbidden":
        return _key_hint(path)
    if kind in ("literal_error", "enum") and isinstance(value, str):
        return _did_you_mean(value, _choices(details))
    if path[-1:] == ("timezone",) and isinstance(value, str):
        return _did_you_mean(value, sorted(zoneinfo.available_timezones()))
    if kind == "bool_type" and str(value).lower() in ("yes", "on", "y", "no", "off", "n"):
        return f"did you mean {'true' if str(value).lower() in ('yes', 'on', 'y') else 'false'}?"
    if kind == "string_pattern_mismatch" and path == ("name",):
        return _name_hint(details)
    if kind == "string_type" and isinstance(value, int | float):
        return "put it in quotes"
    return None


def _key_hint(path: tuple[str | int, ...]) -> str:
    *parent, key = path
    known = _keys_of(_model_at(tuple(parent)))
    elsewhere = [dotted for dotted in _all_keys(FunctionSpec, "") if _last(dotted) == key]
    near = elsewhere[0] if elsewhere else _nearest(str(key), known)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"known keys here: {', '.join(known)}"


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _name_hint(details: ErrorDetails) -> str | None:
    assert details["ctx"]["pattern"] == NAME_PATTERN
    value = str(details["input"]).lower()
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in value[:63])
    near = "-".join(filter(None, kept.split("-")))
    return f"did you mean {near!r}?" if near else None


def _did_you_mean(value: str, choices: list[str]) -> str | None:
    near = _nearest(value, choices)
    return f"did you mean {near!r}?" if near is not None else None


def _nearest(value: str, choices: list[str]) -> str | None:
    by_lower = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(value.lower()[:100], by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def _choices(details: ErrorDetails) -> list[str]:
    expected = str(details["ctx"]["expected"]).replace(" or ", ", ")
    return [choice.strip("'") for choice in expected.split(", ")]


def _keys_of(model: type[BaseModel] | None) -> list[str]:
    return list(model.model_fields) if model else []


def _model_at(path: tuple[str | int, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = FunctionSpec
    for step in path:
        if isinstance(step, str) and model is not None:
            model = _model_in(model.model_fields[step].annotation)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, Union, UnionType):
        return next(filter(None, map(_model_in, get_args(annotation))), None)
    return None


def _all_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")
