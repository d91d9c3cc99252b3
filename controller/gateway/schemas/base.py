"""What all request bodies share: strict types, and a clear word about every other field.

A field of the OpenAI API is honoured (declared on the model), ignored because it cannot change
the answer, or refused unless its value asks for nothing. Nothing is dropped silently.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Neutral = tuple[object, ...]


def wrong_field(reason: str, *, field: str | None = None) -> PydanticCustomError:
    """Return a validation error whose whole message is `reason`.

    Args:
        reason: What is wrong and what to do about it.
        field: Name of the field inside the object being validated, if it is not that object.
    """
    return PydanticCustomError("wrong_field", "{reason}", {"reason": reason, "field": field})


class ApiBody(BaseModel):
    """An object in a request body.

    Attributes:
        ignored: Fields that cannot change the answer.
        unsupported: Fields that are refused, but for the values that ask for nothing.
        replaced: Which other field does what some of those would.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, Neutral]] = {}
    replaced: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def screened(cls, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of an object that are read.

        Raises:
            PydanticCustomError: One is not honoured; the error names it.
        """
        return {name: value for name, value in body.items() if cls._is_read(name, value)}

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, body: object) -> object:
        return cls.screened(body) if isinstance(body, dict) else body

    @classmethod
    def _is_read(cls, name: str, value: object) -> bool:
        if name in cls._read_names():
            return True
        if name in cls.ignored:
            return False
        if name not in cls.unsupported:
            raise wrong_field(f"unknown field{cls._nearest(name)}", field=name)
        neutral = cls.unsupported[name]
        if value is None or any(_is_same(value, other) for other in neutral):
            return False
        if name in cls.replaced:
            raise wrong_field(f"not supported; send {cls.replaced[name]!r} instead", field=name)
        hint = f"leave it out or send {neutral[0]!r}" if neutral else "leave it out"
        raise wrong_field(f"not supported yet; {hint}", field=name)

    @classmethod
    @cache
    def _read_names(cls) -> tuple[str, ...]:
        return tuple(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def _nearest(cls, name: str) -> str:
        known = [*cls._read_names(), *cls.unsupported, *cls.ignored]
        nearest = difflib.get_close_matches(name[:64], known, n=1)
        return f"; did you mean {nearest[0]!r}?" if nearest else "; remove it"

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Describe the ignored and the refused fields too, so that the document is true."""
        schema: dict[str, Any] = handler.resolve_ref_schema(handler(core_schema))
        properties = schema.setdefault("properties", {})
        for name in sorted(cls.ignored):
            properties[name] = {"description": "Accepted and ignored."}
        for name, neutral in cls.unsupported.items():
            properties[name] = {"enum": [None, *neutral], "description": "Not supported yet."}
        schema["additionalProperties"] = False
        return schema


def _is_same(value: object, other: object) -> bool:
    """Compare as JSON does: 0 equals 0.0, but false does not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
