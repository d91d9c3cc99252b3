"""Plain YAML with the place of every key and value.

Knows YAML only. PyYAML parses; the values are built here so that nothing but plain data can come
out and every piece keeps its line and column.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

MAX_DEPTH = 16

Path = tuple[str | int, ...]

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,300}", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Place:
    """A position in the text, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A value and, for each path in it, where its key and its value stand."""

    value: Any
    places: Mapping[Path, tuple[Place, Place]]

    def place(self, path: Path, *, of_key: bool = False) -> Place | None:
        """Return where `path` stands, or the nearest thing around it that is in the text."""
        for length in range(len(path), -1, -1):
            found = self.places.get(path[:length])
            if found is not None:
                return found[0] if of_key or length < len(path) else found[1]
        return None


class DocumentError(Exception):
    """The text is not the plain YAML we read; `faults` are (place, key, message)."""

    def __init__(self, faults: list[tuple[Place, str, str]]) -> None:
        super().__init__("; ".join(message for _, _, message in faults))
        self.faults = faults


def read_document(text: str) -> Document:
    """Parse one document of plain YAML.

    Raises:
        DocumentError: Broken syntax, a duplicate or non-text key, a tag, an anchor, an alias, a
            second document, or too deep a nesting.
    """
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(filter(None, (error.context, error.problem))) or "broken YAML"
        raise DocumentError([(_place(mark), "", f"is not YAML: {message}")]) from error
    except yaml.reader.ReaderError as error:
        message = f"is not YAML: character #x{error.character:04x} at offset {error.position}"
        raise DocumentError([(Place(1, 1), "", message)]) from error
    if root is None:
        raise DocumentError([(Place(1, 1), "", "is empty; a function starts with `name:`")])
    builder = _Builder()
    value = builder.build(root, ())
    if builder.faults:
        raise DocumentError(builder.faults)
    return Document(value=value, places=builder.places)


def _check_events(text: str) -> None:
    """Refuse what must not reach the composer, which recurses and resolves aliases."""
    depth = num_documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                _refuse(event, "has a second document; write one function a file")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            _refuse(event, "uses an anchor or alias; write the value out")
        if tag := getattr(event, "tag", None):
            _refuse(event, f"uses the tag {tag!r}; only plain values are read")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                _refuse(event, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _refuse(event: yaml.Event, message: str) -> None:
    raise DocumentError([(_place(event.start_mark), "", message)])


def _place(mark: Any) -> Place:  # PyYAML has two unrelated classes of marks
    return Place(1, 1) if mark is None else Place(mark.line + 1, mark.column + 1)


class _Builder:
    """Turns nodes into values, collecting places and faults on the way."""

    def __init__(self) -> None:
        self.places: dict[Path, tuple[Place, Place]] = {}
        self.faults: list[tuple[Place, str, str]] = []

    def build(self, node: yaml.Node, path: Path, key: Place | None = None) -> Any:
        place = _place(node.start_mark)
        self.places[path] = (key or place, place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(key_node.start_mark)
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(name, str) or not isinstance(_scalar(key_node), str):
                self.faults.append((place, ".".join(map(str, path)), "has a key that is not text"))
            elif name in built:
                first = self.places[(*path, name)][0]
                message = f"is given twice, first in line {first.line}"
                self.faults.append((place, ".".join(map(str, (*path, name))), message))
            else:
                built[name] = self.build(value_node, (*path, name), place)
        return built


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """Resolve a scalar by the core schema of YAML 1.2."""
    text: str = node.value
    if node.style is not None:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text
