"""From YAML to a FunctionSpec, or to every mistake in it with its place and its remedy.

Only plain YAML is read: no tags, anchors, aliases or second documents, and scalars by the YAML
1.2 rules (`no` and `on` are words, `1:30` is not ninety). Nothing is ever constructed but
mappings, lists, strings, numbers, booleans and null.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from functions.document import Document, DocumentError, Place, read_document
from functions.hints import hint_for
from functions.spec import FunctionSpec, is_local_source

MAX_BYTES = 256 << 10

_TYPE_NAMES = {dict: "a mapping", list: "a list", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: where, what, and the nearest thing that would be right.

    `line` and `column` count from 1 and are None when the spec did not come from text; `key` is
    the dotted path, empty for the document itself.
    """

    key: str
    message: str
    hint: str | None = None
    line: int | None = None
    column: int | None = None

    def to_text(self, origin: str) -> str:
        """Return one line: `file:line:column: key: message; hint`."""
        place = [origin] + [str(n) for n in (self.line, self.column) if n is not None]
        key = f" {self.key}:" if self.key else ""
        return f"{':'.join(place)}:{key} {self.message}" + (f"; {self.hint}" if self.hint else "")


class SpecError(Exception):
    """A spec that cannot be accepted, with all its problems.

    Args:
        origin: The file, or what stands for it.
        problems: At least one, in the order of the text.
    """

    def __init__(self, origin: str, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(problem.to_text(origin) for problem in problems))
        self.origin = origin
        self.problems = problems


def load_file(path: Path) -> FunctionSpec:
    """Read one function from a YAML file; a relative model path starts at the file's directory.

    Raises:
        SpecError: The file cannot be read, or its content is no valid spec.
    """
    origin = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SpecError(origin, (Problem(key="", message=f"cannot be read: {reason}"),)) from error
    spec = load_text(text, origin=origin)
    return _with_absolute_source(spec, path.absolute().parent)


def load_text(text: str, *, origin: str = "<text>") -> FunctionSpec:
    """Read one function from YAML text; model paths stay as they are written.

    Raises:
        SpecError: The text is no valid spec.
    """
    if len(text) > MAX_BYTES:
        message = f"is over {MAX_BYTES >> 10} KiB, which no function spec needs"
        raise SpecError(origin, (Problem(key="", message=message),))
    try:
        document = read_document(text)
    except DocumentError as error:
        problems = tuple(
            Problem(key=key, message=message, line=place.line, column=place.column)
            for place, key, message in error.faults
        )
        raise SpecError(origin, problems) from error
    return _validate(document, origin)


def load_object(value: object, *, origin: str = "spec") -> FunctionSpec:
    """Check a spec that is already parsed, for example from a JSON body.

    Raises:
        SpecError: It is no valid spec; problems have no line.
    """
    return _validate(Document(value=value, places={}), origin)


def _validate(document: Document, origin: str) -> FunctionSpec:
    if not isinstance(document.value, Mapping):
        message = f"must be a mapping that starts with `name:`, got {_shown(document.value)}"
        raise SpecError(origin, (_problem(document.place(()), "", message, None),))
    try:
        return FunctionSpec.model_validate(document.value)
    except ValidationError as error:
        problems = [
            problem
            for details in error.errors(include_url=False)
            for problem in _problems(details, document)
        ]
        problems.sort(key=lambda problem: (problem.line or 0, problem.column or 0))
        raise SpecError(origin, tuple(problems)) from error


def _problems(details: ErrorDetails, document: Document) -> list[Problem]:
    if details["type"] == "contradiction":
        found = details["ctx"]["contradictions"]
        return [
            _problem(document.place(tuple(_steps(key))), _dotted(tuple(_steps(key))), message, None)
            for key, message in found
        ]
    path = details["loc"]
    message = f"{_message(details)}{_got(details)}"
    is_about_key = details["type"] == "extra_forbidden"
    place = document.place(path, of_key=is_about_key)
    return [_problem(place, _dotted(path), message, hint_for(details))]


def _problem(place: Place | None, key: str, message: str, hint: str | None) -> Problem:
    line, column = (place.line, place.column) if place else (None, None)
    return Problem(key=key, message=message, hint=hint, line=line, column=column)


def _message(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is required and missing"
        case "literal_error" | "enum":
            return f"must be {context['expected']}"
        case "value_error":
            return str(context["error"])
        case "int_type":
            return "must be a whole number"
        case "float_type" | "decimal_type":
            return "must be a number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text"
        case "model_type" | "model_attributes_type":
            return "must be a mapping"
        case "tuple_type":
            return "must be a list"
        case "none_required":
            return "must be null in this version"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
    text = details["msg"].removeprefix("Input ")
    return text.replace("should", "must").replace("String must have", "must have")


def _got(details: ErrorDetails) -> str:
    if details["type"] in ("extra_forbidden", "missing"):
        return ""
    return f", got {_shown(details['input'])}"


def _shown(value: object) -> str:
    if value is None or isinstance(value, dict | list):
        return _TYPE_NAMES[type(value)]
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _steps(key: str) -> list[str | int]:
    return [int(step) if step.isdigit() else step for step in key.split(".")]


def _dotted(path: tuple[str | int, ...]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def _with_absolute_source(spec: FunctionSpec, directory: Path) -> FunctionSpec:
    source = spec.model.source
    if not is_local_source(source):
        return spec
    path = directory / Path(source).expanduser()
    # NOTE: the last part stays as written; a hub cache links model.gguf to a blob without suffix.
    resolved = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    updates: dict[str, Any] = {"source": str(resolved)}
    return spec.model_copy(update={"model": spec.model.model_copy(update=updates)})
