"""`python -m snapshots`: build, verify, inspect, list, collect and pin snapshots.

Data goes to stdout, progress and errors to stderr.
"""

import signal
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from snapshots.builder import BuildOptions, BuildReport, build
from snapshots.errors import SnapshotError
from snapshots.exit_codes import EXIT_CODES, ExitCode, exit_code_of
from snapshots.output import OutputFormat, OutputOption, print_json, print_table, size
from snapshots.profiles import ProfileUnusable, read_profiles, scan_profiles
from snapshots.progress import Phase, Progress
from snapshots.reporters import ProgressStyle, print_event, reporter
from snapshots.sources.resolve import resolve_source
from snapshots.store import DAY_S, BrokenSnapshot, Snapshot, SnapshotStore

EPILOG = "Exit codes: " + "; ".join(f"{code.value} {what}" for code, what in EXIT_CODES.items())

app = typer.Typer(
    name="snapshots",
    help="Build, verify and collect snapshots: model weights laid out for fast, verified loading.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "SNAPSHOTS"},
)


class Dtype(StrEnum):
    """Types of weights."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT16 = "float16"


StoreOption = Annotated[
    Path, typer.Option("--store", envvar="SNAPSHOTS_STORE", help="Directory of all snapshots.")
]
RefArgument = Annotated[str, typer.Argument(help="`name` or `name@digest`.")]
ProgressOption = Annotated[
    ProgressStyle, typer.Option(help="A bar on stderr, JSON lines on stdout, or nothing.")
]


@app.command("build", epilog=EPILOG)
def build_command(
    source: Annotated[
        str, typer.Argument(help="Hub id `org/name@revision`, directory, or .gguf file.")
    ],
    store: StoreOption,
    name: Annotated[str | None, typer.Option(help="Of the snapshot; from the source.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="`auto`: the checkpoint's; bfloat16 for quantised GGUF.")
    ] = Dtype.AUTO,
    tp: Annotated[
        list[int] | None, typer.Option(min=1, max=1024, help="Ranks; repeatable.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    progress: ProgressOption = ProgressStyle.BAR,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Build a snapshot, or find it built, or finish an interrupted build."""
    options = BuildOptions(name=name, dtype=dtype, tensor_parallel_sizes=tuple(tp or (1,)))
    try:
        with reporter(progress) as on_progress:
            found = resolve_source(source, revision)
            report = build(found, SnapshotStore(store), options, on_progress=on_progress)
    except SnapshotError as error:
        if progress is ProgressStyle.JSON:
            kind = type(error).__name__
            print_event("error", type=kind, message=error.message, hint=error.hint)
        _fail(error)
    _print_built(report, progress, output)


@app.command(epilog=EPILOG)
def verify(
    ref: RefArgument,
    store: StoreOption,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Take it out of use if it is damaged.")
    ] = False,
    progress: ProgressOption = ProgressStyle.BAR,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Read a whole snapshot back and name every file, chunk and tensor that is wrong."""
    from snapshots.verifier import find_corruption  # imports numpy

    snapshots = SnapshotStore(store)
    try:
        snapshot = snapshots.get(ref)
    except SnapshotError as error:
        _fail(error)
    with reporter(progress) as on_progress:
        done = _Adder(snapshot.manifest.size_bytes, on_progress)
        problems = list(find_corruption(snapshot, done))
    result = {
        "snapshot": snapshot.ref,
        "num_bytes": snapshot.manifest.size_bytes,
        "problems": [
            {
                "path": str(problem.path),
                "chunk": problem.chunk,
                "tensors": problem.tensors,
                "message": problem.message,
            }
            for problem in problems
        ],
    }
    if output is OutputFormat.JSON:
        print_json(result)
    elif not problems:
        typer.echo(f"{snapshot.ref}: {size(snapshot.manifest.size_bytes)} verified")
    for problem in problems:
        _complain(problem)
    if problems and quarantine:
        place = snapshots.quarantine(snapshot.ref, "\n".join(p.message for p in problems))
        typer.echo(f"moved to {place}: the next build makes it anew", err=True)
    if problems:
        raise typer.Exit(ExitCode.CORRUPTED)


@app.command(epilog=EPILOG)
def inspect(
    ref: RefArgument,
    store: StoreOption,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the first rank's too.")] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show what a snapshot holds and where it came from."""
    snapshots = SnapshotStore(store)
    try:
        snapshot = snapshots.get(ref)
        pins = list(snapshots.pins(snapshot.ref))
    except SnapshotError as error:
        _fail(error)
    slots = _first_rank(snapshot) if tensors else {}
    if output is OutputFormat.JSON:
        facts = asdict(snapshot.manifest) | {"ref": snapshot.ref, "path": str(snapshot.path)}
        facts |= {"pins": pins, "profiles": [asdict(one) for one in read_profiles(snapshot.path)]}
        print_json(facts | ({"tensors": slots} if tensors else {}))
        return
    manifest = snapshot.manifest
    source = manifest.source
    print_table(
        ["", ""],
        [
            ["snapshot", snapshot.ref],
            ["path", snapshot.path],
            ["source", f"{source.kind} {source.location} {source.revision}".rstrip()],
            ["architecture", manifest.architecture],
            ["dtype", manifest.dtype],
            ["ranks", ", ".join(map(str, manifest.tensor_parallel_sizes))],
            ["pins", ", ".join(pins) or "none"],
            *(["profile", f"{one['key']} of {one['device']}"] for one in _profiles(snapshot)),
        ],
    )
    print_table(
        ["file", "size"],
        [[file.path, size(file.size_bytes)] for file in manifest.ranks]
        + [[file.path, size(file.size_bytes)] for file in manifest.files],
    )
    if tensors:
        rows = [
            [name, slot["dtype"], slot["shape"], slot["offset"]] for name, slot in slots.items()
        ]
        print_table(["tensor", "dtype", "shape", "offset"], rows)


@app.command("list", epilog=EPILOG)
def list_command(store: StoreOption, output: OutputOption = OutputFormat.TABLE) -> None:
    """List all snapshots."""
    snapshots = SnapshotStore(store)
    found = snapshots.list()
    pins = [list(snapshots.pins(snapshot.ref)) for snapshot in found]
    broken, quarantined = snapshots.broken(), snapshots.quarantined()
    if output is OutputFormat.JSON:
        rows = [
            _summary(snapshot) | {"pins": p, "profiles": _profiles(snapshot)}
            for snapshot, p in zip(found, pins, strict=True)
        ]
        print_json(
            {
                "snapshots": rows,
                "broken": [_unusable(entry) for entry in broken],
                "quarantined": [_unusable(entry) for entry in quarantined],
            }
        )
        return
    print_table(
        ["snapshot", "dtype", "ranks", "size", "pins", "profiles", "source"],
        [
            [
                snapshot.ref,
                snapshot.manifest.dtype,
                ", ".join(map(str, snapshot.manifest.tensor_parallel_sizes)),
                size(snapshot.manifest.size_bytes),
                ", ".join(owners),
                ", ".join(dict.fromkeys(one["device"] for one in _profiles(snapshot))),
                snapshot.manifest.source.location,
            ]
            for snapshot, owners in zip(found, pins, strict=True)
        ],
    )
    for snapshot in found:
        for key, profile in scan_profiles(snapshot.path).items():
            if isinstance(profile, ProfileUnusable):
                typer.echo(f"not used: {snapshot.ref}: profile {key}: {profile}", err=True)
    for entry in broken:
        typer.echo(f"broken: {entry.ref}: {entry.reason}", err=True)
    for entry in quarantined:
        typer.echo(f"quarantined: {entry.ref}: {entry.reason}", err=True)


@app.command(epilog=EPILOG)
def gc(
    store: StoreOption,
    refs: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    stale_after: Annotated[
        float, typer.Option(min=0, help="Seconds an interrupted build is kept for resuming.")
    ] = DAY_S,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Remove snapshots that nobody has pinned, and abandoned builds."""
    try:
        removed = SnapshotStore(store).collect(
            only=refs or None, dry_run=dry_run, stale_after_s=stale_after
        )
    except SnapshotError as error:
        _fail(error)
    total = sum(entry.num_bytes for entry in removed)
    if output is OutputFormat.JSON:
        entries = [asdict(entry) for entry in removed]
        print_json({"removed": entries, "num_bytes": total, "dry_run": dry_run})
        return
    print_table(["removed", "size"], [[entry.ref, size(entry.num_bytes)] for entry in removed])
    verb = "would free" if dry_run else "freed"
    typer.echo(f"{verb} {size(total)}", err=True)


@app.command(epilog=EPILOG)
def pin(
    ref: RefArgument,
    store: StoreOption,
    owner: Annotated[str, typer.Option(help="Who needs it.")] = "operator",
) -> None:
    """Keep a snapshot from being collected."""
    _or_fail(lambda: SnapshotStore(store).pin(ref, owner))


@app.command(epilog=EPILOG)
def unpin(
    ref: RefArgument,
    store: StoreOption,
    owner: Annotated[str, typer.Option(help="Who needed it.")] = "operator",
) -> None:
    """Let a snapshot be collected again."""
    _or_fail(lambda: SnapshotStore(store).unpin(ref, owner))


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()


class _Adder:
    """Turns byte counts into progress of the checksum phase."""

    def __init__(self, total_bytes: int, on_progress: Callable[[Progress], None]) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._on_progress = on_progress

    def __call__(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._on_progress(
            Progress(
                phase=Phase.CHECKSUM, done_bytes=self._done_bytes, total_bytes=self._total_bytes
            )
        )


def _print_built(report: BuildReport, progress: ProgressStyle, output: OutputFormat) -> None:
    ref, path = report.snapshot.ref, str(report.snapshot.path)
    if progress is ProgressStyle.JSON:
        print_event("built", snapshot=ref, path=path, reused=report.is_reused)
    elif output is OutputFormat.JSON:
        print_json({"snapshot": ref, "path": path, "reused": report.is_reused})
    else:
        typer.echo(ref)
        typer.echo("found it built" if report.is_reused else f"built {path}", err=True)


def _unusable(entry: BrokenSnapshot) -> dict[str, str]:
    return {"snapshot": entry.ref, "reason": entry.reason}


def _summary(snapshot: Snapshot) -> dict[str, Any]:
    manifest = snapshot.manifest
    return {
        "snapshot": snapshot.ref,
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "tensor_parallel_sizes": list(manifest.tensor_parallel_sizes),
        "size_bytes": manifest.size_bytes,
        "source": manifest.source.location,
    }


def _profiles(snapshot: Snapshot) -> list[dict[str, str]]:
    return [
        {"key": profile.key, "device": profile.fingerprint.get("device", "unknown")}
        for profile in read_profiles(snapshot.path)
    ]


def _first_rank(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    from snapshots.loader import open_rank  # imports torch

    num_ranks = snapshot.manifest.tensor_parallel_sizes[0]
    try:
        rank = open_rank(snapshot.path, tensor_parallel_size=num_ranks)
    except SnapshotError as error:
        _fail(error)
    return {name: asdict(slot) for name, slot in rank.tensors.items()}


def _or_fail(action: Callable[[], object]) -> None:
    try:
        action()
    except SnapshotError as error:
        _fail(error)


def _fail(error: SnapshotError) -> NoReturn:
    _complain(error)
    raise typer.Exit(exit_code_of(error)) from error


def _complain(error: SnapshotError) -> None:
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
