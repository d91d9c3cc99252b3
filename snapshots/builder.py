"""From a source to a published snapshot: planned, streamed, resumable, atomic.

An existing snapshot of the same source is found without opening the source or importing torch.
"""

import errno
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from snapshots.architectures.registry import architecture_of
from snapshots.architectures.weights import Architecture
from snapshots.checksums import describe_rank, plain_file
from snapshots.durable import remove_tree, sync
from snapshots.errors import DiskFull, SourceError, SourceInvalid, SourceUnsupported
from snapshots.layout import DTYPE_CODES, RankLayout, check_parts, numbered, plan
from snapshots.locking import locked
from snapshots.manifest import FORMAT_VERSION, Manifest, RankFile, Source, check_name
from snapshots.model_shape import ModelShape
from snapshots.progress import OnProgress, Phase, Progress, ignore_progress
from snapshots.sources.base import Checkpoint, Identity, ModelSource
from snapshots.staging import Stage
from snapshots.store import MANIFEST_FILE, Snapshot, SnapshotStore, has_dtype, is_whole

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to make of a source.

    Attributes:
        name: Of the snapshot; None derives it from the source.
        dtype: Of the weights; `auto` takes the checkpoint's, bfloat16 for quantised GGUF.
        tensor_parallel_sizes: Numbers of ranks to lay out files for.
    """

    name: str | None = None
    dtype: str = AUTO
    tensor_parallel_sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build has done.

    Attributes:
        snapshot: The result.
        is_reused: Whether it existed already.
        num_resumed_groups: Groups of tensors taken over from an interrupted build.
    """

    snapshot: Snapshot
    is_reused: bool
    num_resumed_groups: int = 0


def build(
    source: ModelSource,
    store: SnapshotStore,
    options: BuildOptions | None = None,
    *,
    on_progress: OnProgress = ignore_progress,
) -> BuildReport:
    """Build a snapshot, or find it built, or finish what an earlier call has begun.

    Two calls for the same build run one after the other, in one process or several, and the
    second finds the result of the first. Killing it at any point leaves nothing visible.

    Raises:
        SourceError: The source cannot be used.
        TensorParallelUnsupported: It does not divide over the ranks.
        InvalidName: The name cannot be used.
        DiskFull: The store has no room, and nothing is kept; or the source has none to download.
    """
    wanted = _checked(options or BuildOptions())
    identity = source.identify()
    existing = _existing(store, identity, wanted)
    if existing is not None:
        return BuildReport(snapshot=existing, is_reused=True)
    key = _key(identity, wanted)
    with locked(store.stage_lock(key)):
        existing = _existing(store, identity, wanted)
        if existing is not None:
            return BuildReport(snapshot=existing, is_reused=True)
        with source.open(on_progress) as checkpoint:
            work = _Build(source, identity, checkpoint, wanted, on_progress)
            with _told_when_full(store, key):
                report = work.run(store, key)
        store.stage_lock(key).unlink(missing_ok=True)
        return report


class _Build:
    """One attempt, holding the lock of its stage."""

    def __init__(
        self,
        source: ModelSource,
        identity: Identity,
        checkpoint: Checkpoint,
        options: BuildOptions,
        on_progress: OnProgress,
    ) -> None:
        self._source = source
        self._identity = identity
        self._checkpoint = checkpoint
        self._options = options
        self._on_progress = on_progress
        self._dtype = checkpoint.dtype if options.dtype == AUTO else options.dtype
        self._architecture = architecture_of(checkpoint.config)
        shape = ModelShape.from_config(checkpoint.config)
        self._layouts = plan(
            self._architecture,
            shape,
            present=checkpoint.tensors,
            dtype=self._dtype,
            tensor_parallel_sizes=options.tensor_parallel_sizes,
        )
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        check_parts(self._architecture, shape, self._layouts, shapes)
        _check_nothing_left(self._architecture, self._layouts, checkpoint)

    def run(self, store: SnapshotStore, key: str) -> BuildReport:
        stage = Stage(store.stage(key), self._layouts, _plan_digest(self._identity, self._layouts))
        try:
            num_resumed, manifest = self._fill(stage)
        except SourceError:
            remove_tree(stage.directory)  # the next attempt would fail too
            raise
        snapshot = store.publish(stage.content, manifest)
        remove_tree(stage.directory)
        return BuildReport(snapshot=snapshot, is_reused=False, num_resumed_groups=num_resumed)

    def _fill(self, stage: Stage) -> tuple[int, Manifest]:
        """Write everything that is published; return how much was there, and the manifest."""
        stage.begin()
        self._checkpoint.write_files(stage.content)  # before much disk space is taken
        with stage:
            num_resumed = self._convert(stage)
            ranks = self._checksum(stage)
        manifest = self._manifest(stage, ranks)
        (stage.content / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        if self._source.identify() != self._identity:
            raise SourceInvalid(f"{self._identity.location} changed while it was built from")
        for path in (*stage.content.rglob("*"), stage.content):
            sync(path)
        return num_resumed, manifest

    def _convert(self, stage: Stage) -> int:
        from snapshots.convert import convert_group  # imports torch

        num_resumed = stage.completed()
        stage.clear_after(num_resumed)
        groups = range(len(self._layouts[0].groups))
        meter = _Meter(Phase.CONVERT, self._num_bytes(groups), self._on_progress)
        meter.advance(self._num_bytes(range(num_resumed)))
        for group in groups[num_resumed:]:
            convert_group(
                self._checkpoint,
                self._layouts,
                stage.descriptors,
                group,
                dtype=self._dtype,
                on_bytes=meter.advance,
            )
            stage.record(group)
        meter.finish()
        return num_resumed

    def _checksum(self, stage: Stage) -> tuple[RankFile, ...]:
        meter = _Meter(
            Phase.CHECKSUM, sum(layout.size_bytes for layout in self._layouts), self._on_progress
        )
        ranks = []
        for layout, descriptor in zip(self._layouts, stage.descriptors, strict=True):
            ranks.append(describe_rank(layout, descriptor, meter.advance))
        meter.finish()
        return tuple(ranks)

    def _manifest(self, stage: Stage, ranks: tuple[RankFile, ...]) -> Manifest:
        names = sorted(path.name for path in stage.content.iterdir() if path.is_file())
        return Manifest(
            format_version=FORMAT_VERSION,
            name=self._options.name or _name_from(self._source.default_name),
            source=Source(
                kind=self._identity.kind,
                location=self._identity.location,
                requested_revision=self._identity.requested_revision,
                revision=self._identity.revision,
                fingerprint=self._identity.fingerprint,
                dtype=self._checkpoint.dtype,
            ),
            architecture=self._architecture.name,
            dtype=self._dtype,
            tensor_parallel_sizes=self._options.tensor_parallel_sizes,
            ranks=ranks,
            files=tuple(plain_file(stage.content, n) for n in names if n != MANIFEST_FILE),
        )

    def _num_bytes(self, groups: Sequence[int]) -> int:
        return sum(
            tensor.slot.num_bytes
            for layout in self._layouts
            for group in groups
            for tensor in layout.groups[group].tensors
        )


class _Meter:
    """Adds up bytes and reports the sum."""

    def __init__(self, phase: Phase, total_bytes: int, on_progress: OnProgress) -> None:
        self._phase = phase
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0

    def advance(self, num_bytes: int) -> None:
        self._report(self._done_bytes + num_bytes)

    def finish(self) -> None:
        self._report(self._total_bytes)  # padding of the vocabulary is never written

    def _report(self, done_bytes: int) -> None:
        self._done_bytes = min(done_bytes, self._total_bytes)
        self._on_progress(
            Progress(phase=self._phase, done_bytes=self._done_bytes, total_bytes=self._total_bytes)
        )


def _checked(options: BuildOptions) -> BuildOptions:
    if options.name is not None:
        check_name(options.name)
    if options.dtype != AUTO and options.dtype not in DTYPE_CODES:
        raise SourceUnsupported(f"weights cannot be served in {options.dtype!r}")
    sizes = tuple(sorted(set(options.tensor_parallel_sizes)))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"tensor parallel sizes {sizes!r}")
    return BuildOptions(name=options.name, dtype=options.dtype, tensor_parallel_sizes=sizes)


def _existing(store: SnapshotStore, identity: Identity, options: BuildOptions) -> Snapshot | None:
    for snapshot in store.list():
        manifest = snapshot.manifest
        if (
            manifest.source.kind is identity.kind
            and manifest.source.location == identity.location
            and manifest.source.fingerprint == identity.fingerprint
            and has_dtype(manifest, options.dtype)
            and set(options.tensor_parallel_sizes) <= set(manifest.tensor_parallel_sizes)
            and options.name in (None, manifest.name)
            and is_whole(snapshot)
        ):
            return snapshot
    return None


def _key(identity: Identity, options: BuildOptions) -> str:
    text = repr((FORMAT_VERSION, asdict(identity), asdict(options)))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _plan_digest(identity: Identity, layouts: Sequence[RankLayout]) -> str:
    sha256 = hashlib.sha256(identity.fingerprint.encode())
    for layout in layouts:
        sha256.update(layout.header)
    return sha256.hexdigest()


def _name_from(text: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:96]
    return check_name(cleaned or "model")


def _check_nothing_left(
    architecture: Architecture, layouts: Sequence[RankLayout], checkpoint: Checkpoint
) -> None:
    used = {
        piece.source
        for group in layouts[0].groups
        for tensor in group.tensors
        for piece in tensor.pieces
    }
    # A tied head may be stored all the same.
    if architecture.head is not None:
        used |= {numbered(part.name, None) for part in architecture.head.parts}
    left = [
        name
        for name in checkpoint.tensors
        if name not in used and not any(re.fullmatch(p, name) for p in architecture.ignored)
    ]
    if left:
        raise SourceUnsupported(
            f"{len(left)} tensors are not part of a {architecture.name} model as it is served "
            f"here: {', '.join(sorted(left)[:3])}"
        )


@contextmanager
def _told_when_full(store: SnapshotStore, key: str) -> Iterator[None]:
    """Turn a full disk into our error and give back what the build had taken."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if store.stage(key).exists():
            remove_tree(store.stage(key))
        raise DiskFull(
            f"no room for the build in {store.root}: {error.strerror}",
            hint="free some space (`snapshots gc` may help) and build again",
        ) from error
