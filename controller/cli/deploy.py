"""`coldspark deploy`, and what can be done with spec files offline: `validate` and `schema`."""

import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from controller.cli.connection import connect, function_path
from controller.cli.errors import CliError, SpecProblem
from controller.cli.functions import build_text, show_functions
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    note,
    print_json,
    print_table,
    stderr_console,
)

if TYPE_CHECKING:
    from controller.cli.client import ControllerClient
    from functions.spec import FunctionSpec

POLL_S = 0.3

FileOption = Annotated[
    list[Path],
    typer.Option("--file", "-f", help="A function's YAML file; repeatable.", show_default=False),
]


class BackendName(StrEnum):
    """Where replicas run."""

    PROCESS = "process"
    DOCKER = "docker"


def deploy(
    context: typer.Context,
    files: FileOption,
    backend: Annotated[
        BackendName, typer.Option(help="Run replicas as processes or as containers.")
    ] = BackendName.PROCESS,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the snapshot is built.")
    ] = True,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Deploy functions, new or changed. All files are checked before anything is sent."""
    specs = _load_all(files)
    with connect(context) as controller:
        views = []
        for spec in specs:
            body = {"spec": spec.to_json(), "backend": backend.value}
            view = controller.call("PUT", function_path(spec.name), body=body)
            views.append(_wait_for_snapshot(controller, view) if wait else view)
        show_functions(views, output)


def _load_all(files: Sequence[Path]) -> "list[FunctionSpec]":
    # YAML and pydantic take 0.2 s that most commands do not need.
    from functions.loader import SpecError, load_file

    specs: dict[str, FunctionSpec] = {}
    problems = []
    for path in files:
        try:
            spec = load_file(path)
        except SpecError as error:
            problems.append(str(error))
            continue
        if spec.name in specs:
            problems.append(f"{path}: name: {spec.name!r} is in another of these files too")
        specs[spec.name] = spec
    if problems:
        count = sum(problem.count("\n") + 1 for problem in problems)
        note("\n".join(problems))
        raise SpecProblem(
            f"{count} problem{'s' if count > 1 else ''} in {len(problems)} of {len(files)} files",
            hint="docs/reference/function-spec.md lists every key; `coldspark schema` prints the "
            "JSON Schema",
        )
    return list(specs.values())


def _wait_for_snapshot(
    controller: "ControllerClient", view: Mapping[str, Any]
) -> Mapping[str, Any]:
    name = view["name"]
    with BuildProgress(name) as progress:
        while view["snapshot_state"] == "building":
            progress.show(view)
            time.sleep(POLL_S)
            view = controller.call("GET", function_path(name))
    if view["snapshot_state"] == "failed":
        raise CliError(
            f"the snapshot of {name!r} could not be built: {view['last_error']}",
            hint="mend the cause and deploy again; a finished part is not built twice",
        )
    return view


class BuildProgress:
    """A bar on a terminal, a line a phase anywhere else; always on stderr."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._phase = ""
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            console=stderr_console(),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "BuildProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, view: Mapping[str, Any]) -> None:
        """Show how far a build is."""
        build = view.get("build") or {"phase": "waiting", "done_bytes": 0, "total_bytes": 0}
        if build["phase"] != self._phase:
            self._begin(build["phase"], view)
        if self._task is not None:
            total = build["total_bytes"] or None
            self._bar.update(self._task, completed=build["done_bytes"], total=total)

    def _begin(self, phase: str, view: Mapping[str, Any]) -> None:
        self._phase = phase
        if self._bar.disable:
            note(f"{self._name}: {build_text(view)}")
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"{self._name}: {phase}", total=None)


def validate(files: FileOption, output: OutputOption = OutputFormat.TABLE) -> None:
    """Check function specs offline, listing every problem with its place."""
    specs = _load_all(files)
    from functions.spec import revision  # already loaded by now

    rows = [(spec.name, revision(spec), spec.model.source) for spec in specs]
    if output is OutputFormat.JSON:
        keys = ("name", "revision", "source")
        print_json({"functions": [dict(zip(keys, row, strict=True)) for row in rows]})
    else:
        print_table(("NAME", "REVISION", "SOURCE"), rows)


def schema() -> None:
    """Print the JSON Schema of a function spec."""
    from functions.schema import json_schema_text  # pydantic, 0.2 s

    typer.echo(json_schema_text(), nl=False)
