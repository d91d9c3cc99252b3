"""Writes the pages of docs/reference that follow from the code.

`python docs/generate_reference.py` writes them; with `--check` it only names the stale ones and
exits 1.
"""

import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main

import snapshots.cli
import snapshots.exit_codes
from controller import errors
from controller.cli import profile
from controller.cli.app import app
from controller.cli.errors import EXIT_CODES
from controller.gateway.schemas.base import ApiBody, Neutral
from controller.gateway.schemas.chat import ChatCompletionRequest, ChatMessage, TextPart
from controller.gateway.schemas.completions import CompletionRequest
from controller.gateway.schemas.response_input import InputText, MessageItem
from controller.gateway.schemas.responses import ResponseRequest
from controller.gateway.schemas.sampling import SamplingBody
from controller.settings import PREFIX, Settings
from functions.schema import json_schema
from functions.units import format_duration, format_size

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/generate_reference.py: edit the code it reads instead. -->\n"
TYPE_WORDS = {"boolean": "true or false", "integer": "whole number", "string": "text"}
Schema = Mapping[str, Any]


def function_spec_page() -> str:
    """Return the page of every key of a function's YAML file."""
    schema = json_schema()
    lines = [
        "# Function spec",
        GENERATED,
        "One function a file, in plain YAML 1.2. Only `name` and `model.source` are required. "
        "Unknown keys are errors.",
        "",
        "- A *duration* is `250ms`, `90s`, `5m`, `1h30m`, `2d`, or a number of seconds; at most "
        "365 days.",
        "- A *size* is `24Gi`, `512MiB` (powers of 1024), `1G`, `100 MB` (powers of 1000), or a "
        "number of bytes.",
        "",
        "`coldspark validate -f FILE` checks a file without a controller; "
        "`functions/function.schema.json` is the JSON Schema for editors.",
        "",
        "## Top level",
        "",
    ]
    sections = {}
    rows = []
    for key, field in schema["properties"].items():
        section = _section_of(field)
        if section is None or "name" in field:
            rows.append(_spec_row(key, field, schema))
            continue
        sections[key] = schema["$defs"][section]
        text = field.get("description") or sections[key]["description"]
        kind = "list of sections" if field.get("type") == "array" else "section"
        rows.append(f"| [`{key}`](#{key}) | {kind} | {_default(key, field, schema)} | {text} |")
    lines += [*_TABLE_HEAD, *rows]
    for key, section in sections.items():
        lines += ["", f"## {key}", "", section["description"], "", *_TABLE_HEAD]
        lines += [_spec_row(name, field, section) for name, field in section["properties"].items()]
    return "\n".join(lines) + "\n"


_TABLE_HEAD = ["| key | type | default | meaning |", "|---|---|---|---|"]


def _spec_row(key: str, field: Schema, owner: Schema) -> str:
    meaning = _cell(field["description"])
    return f"| `{key}` | {_cell(_type(field))} | {_default(key, field, owner)} | {meaning} |"


def _section_of(field: Schema) -> str | None:
    reference = field.get("$ref") or field.get("items", {}).get("$ref")
    return str(reference).rpartition("/")[2] if reference else None


def _default(key: str, field: Schema, owner: Schema) -> str:
    if key in owner.get("required", ()):
        return "required"
    if "default" not in field:
        return ""
    value = field["default"]
    if isinstance(value, float | int) and (kind := _special(field)):
        return f"`{format_duration(value) if kind == 'duration' else format_size(int(value))}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _special(field: Schema) -> str | None:
    parts = [field, *field.get("anyOf", ())]
    return next((part["x-coldspark-type"] for part in parts if "x-coldspark-type" in part), None)


def _type(field: Schema) -> str:
    """Return a field's type in words, with its bounds."""
    kind = _special(field)
    parts = field.get("anyOf", [field])
    if kind is None:
        kind = _plain_type(parts[0])
    is_nullable = any(part.get("type") == "null" for part in parts)
    return f"{kind} or null" if is_nullable and kind != "null" else kind


def _plain_type(part: Schema) -> str:
    if "$ref" in part:
        part = json_schema()["$defs"][part["$ref"].rpartition("/")[2]]
    if "enum" in part:
        return " · ".join(f"`{value}`" for value in part["enum"])
    if part.get("type") == "array":
        return f"list of {_plain_type(part['items'])}"
    if part.get("type") == "null":
        return "null"
    return " ".join([TYPE_WORDS.get(part["type"], str(part["type"])), *_bounds(part)])


def _bounds(part: Schema) -> Iterator[str]:
    if "exclusiveMinimum" in part:
        yield f"over {part['exclusiveMinimum']}"
    if "minimum" in part:
        yield f"from {part['minimum']}"
    if "maximum" in part:
        yield f"to {part['maximum']}"
    if "pattern" in part:
        yield f"`{part['pattern']}`"


BODIES: Mapping[str, type[SamplingBody]] = {
    "chat": ChatCompletionRequest,
    "completions": CompletionRequest,
    "responses": ResponseRequest,
}


CONTENT_PARTS: Mapping[type[ApiBody], type[ApiBody]] = {
    ChatMessage: TextPart,
    MessageItem: InputText,
}
"""Contents are read into plain text, so these are in no annotation."""


def request_fields_page() -> str:
    """Return the page of every field of the bodies that generate text."""
    lines = [
        "# Request fields",
        GENERATED,
        "What `/v1/chat/completions`, `/v1/completions` and `/v1/responses` do with each field. A "
        "field that is in none of these lists is refused with the nearest known name, so nothing "
        "is dropped silently. `null` always means that the field is left out.",
        "",
        "## Honoured",
        "",
        "| field | of | meaning |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(name for body in BODIES.values() for name in body.model_fields):
        meanings: dict[str, list[str]] = {}
        for kind, body in BODIES.items():
            if name in body.model_fields:
                meaning = _cell(body.model_fields[name].description)
                meanings.setdefault(meaning, []).append(kind)
        lines += [f"| `{name}` | {_bodies(having)} | {text} |" for text, having in meanings.items()]
    lines += [
        "",
        "`response_format`, `text.format` and `structured_outputs`: see "
        "[structured outputs](../guides/structured-outputs.md).",
        "",
        "## Ignored",
        "",
        "Clients send these, and they cannot change the answer.",
        "",
        "| field | of |",
        "|---|---|",
    ]
    ignored = _by_path(lambda part: dict.fromkeys(part.ignored, ()))
    lines += [f"| `{path}` | {_bodies(list(having))} |" for path, having in sorted(ignored.items())]
    lines += [
        "",
        "## Refused",
        "",
        "With 400, unless the value is one that asks for nothing.",
        "",
        "| field | of | accepted values |",
        "|---|---|---|",
    ]
    for path, having in _by_path(lambda part: part.unsupported).items():
        neutral = next(iter(having.values()))
        values = " ".join(f"`{json.dumps(value)}`" for value in neutral)
        lines.append(f"| `{path}` | {_bodies(list(having))} | {values or '—'} |")
    return "\n".join(lines) + "\n"


def _by_path(
    told: Callable[[type[ApiBody]], Mapping[str, Neutral]],
) -> dict[str, dict[str, Neutral]]:
    """Return what is told of fields, of parts of bodies too: by path, then by body."""
    found: dict[str, dict[str, Neutral]] = {}
    for kind, body in BODIES.items():
        for prefix, part in _parts(body, ""):
            for name, neutral in told(part).items():
                found.setdefault(prefix + name, {})[kind] = neutral
    return found


def _parts(body: type[ApiBody], prefix: str) -> Iterator[tuple[str, type[ApiBody]]]:
    """Yield a body and the objects in it, with what their fields' paths begin with."""
    yield prefix, body
    if body in CONTENT_PARTS:
        yield f"{prefix}content[].", CONTENT_PARTS[body]
    for name, field in body.model_fields.items():
        for is_listed, part in _objects(field.annotation):
            path = f"{prefix}{field.alias or name}{'[]' if is_listed else ''}."
            yield from _parts(part, path)


def _objects(kind: Any) -> Iterator[tuple[bool, type[ApiBody]]]:
    """Yield the objects of a type, and whether they are in a list."""
    if isinstance(kind, type) and issubclass(kind, ApiBody):
        yield False, kind
        return
    is_list = typing.get_origin(kind) is list
    for inner in typing.get_args(kind):
        for is_listed, part in _objects(inner):
            yield is_list or is_listed, part


def _bodies(having: Sequence[str]) -> str:
    """Return which of the bodies have something, in words."""
    return "all" if len(having) == len(BODIES) else ", ".join(having)


def settings_page() -> str:
    """Return the page of the controller's settings."""
    lines = [
        "# Settings",
        GENERATED,
        "The controller reads these variables once, when it starts. A malformed value or an "
        f"unknown `{PREFIX}` variable stops the start with its name. `coldspark up` has options "
        "for host, port and home, which win over the variables.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        lines.append(f"| `{PREFIX}{name.upper()}` | `{default}` | {_cell(field.description)} |")
    lines += [
        "",
        "Durations end in `_S` and are seconds. An address other than loopback forces API keys on.",
        "",
        "Read by the command line only:",
        "",
        "| variable | meaning |",
        "|---|---|",
        "| `COLDSPARK_URL` | Address of the controller; `--url` wins. |",
        "| `COLDSPARK_API_KEY` | Sent as a bearer token; `--api-key` wins. |",
        "| `COLDSPARK_OUTPUT` | `table` or `json`; `-o` wins. |",
    ]
    return "\n".join(lines) + "\n"


def errors_page() -> str:
    """Return the page of every HTTP error."""
    lines = [
        "# Errors",
        GENERATED,
        "Every refusal has OpenAI's envelope, whatever the endpoint:",
        "",
        "```json",
        '{"error": {"message": "…", "type": "invalid_request_error", "param": "model", '
        '"code": "model_not_found"}}',
        "```",
        "",
        "`message` says what failed, the value, and what to do. `param` names the field, where "
        "there is one. Errors that can pass carry `Retry-After`. In a stream that has begun, the "
        "error is an event, and the stream ends without `[DONE]`; a response's ends with `response.failed`.",
        "",
        "| status | code | type | when |",
        "|---|---|---|---|",
    ]
    leaves = sorted(_subclasses(errors.ApiError), key=lambda kind: (kind.status, kind.__name__))
    for kind in leaves:
        meaning = _cell(inspect.getdoc(kind) or "")
        lines.append(f"| {kind.status} | `{kind.code or 'null'}` | `{kind.type}` | {meaning} |")
    return "\n".join(lines) + "\n"


def _subclasses(kind: type[errors.ApiError]) -> Iterator[type[errors.ApiError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def cli_page() -> str:
    """Return the page of every command."""
    group = typer.main.get_command(app)
    codes = {int(code): meaning for code, meaning in snapshots.exit_codes.EXIT_CODES.items()}
    codes |= {int(code): meaning for code, meaning in EXIT_CODES.items()}
    lines = [
        "# Command line",
        GENERATED,
        str(group.help),
        "",
        "Data goes to stdout, everything else to stderr. A failure is told as `error: …`, with a "
        "`hint: …` where there is one. `-o json` prints one JSON document. `coldspark snapshots …` works without a "
        "controller, all but `profile`; its variables are `SNAPSHOTS_STORE` and `SNAPSHOTS_OUTPUT`, by default the "
        "controller's store and `COLDSPARK_OUTPUT`.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| {code:d} | {meaning} |" for code, meaning in sorted(codes.items())),
        "",
        "## Options before the command",
        "",
        *_parameter_table(group),
    ]
    commands = dict(_commands(group, "coldspark"))
    del commands["coldspark snapshots"]
    commands |= _commands(typer.main.get_command(snapshots.cli.app), "coldspark snapshots")
    commands["coldspark snapshots profile"] = typer.main.get_command(profile.app)
    for name, command in sorted(commands.items()):
        usage = " ".join([name, *(_usage(parameter) for parameter in command.params)])
        lines += ["", f"## {name}", "", str(command.help), "", "```", usage.strip(), "```"]
        if any(parameter.name != "help" for parameter in command.params):
            lines += ["", *_parameter_table(command)]
    return "\n".join(lines) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        word = parameter.name.upper()
        return word if parameter.required else f"[{word}]"
    return f"{parameter.opts[0]} …" if parameter.required else ""


def _parameter_table(command: Any) -> list[str]:
    hidden = {"help", "install_completion", "show_completion"}
    rows = [_parameter_row(p) for p in command.params if p.name not in hidden]
    return ["| option | default | environment | meaning |", "|---|---|---|---|", *rows]


def _parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.name.upper()}`"
    else:
        name = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    shown = "required" if parameter.required else ""
    if not parameter.required and default not in (None, False):
        shown = f"`{'true' if default is True else getattr(default, 'value', default)}`"
    variable = f"`{parameter.envvar}`" if parameter.envvar else ""
    return f"| {name} | {shown} | {variable} | {_cell(parameter.help)} |"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


PAGES = {
    "function-spec.md": function_spec_page,
    "request-fields.md": request_fields_page,
    "settings.md": settings_page,
    "errors.md": errors_page,
    "cli.md": cli_page,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` name the stale ones; returns the exit code."""
    pages = {REFERENCE / name: page() for name, page in PAGES.items()}
    if arguments == ["--check"]:
        stale = [p.name for p, text in pages.items() if not p.exists() or p.read_text() != text]
        for name in stale:
            sys.stderr.write(f"docs/reference/{name} is stale: python docs/generate_reference.py\n")
        return 1 if stale else 0
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
