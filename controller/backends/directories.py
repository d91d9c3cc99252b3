"""One directory a runtime: its socket, its log, and a record of what was intended.

The record is written before anything is started, so that a controller that dies in between leaves
something to find. Everything here blocks: call it off the event loop.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from controller.backends.base import BackendError, RuntimeInfo, RuntimePhase, RuntimeSpec
from controller.backends.processes import ProcessRef

log = structlog.get_logger(__name__)

SOCKET_NAME = "runtime.sock"
RECORD_NAME = "runtime.json"
MAX_SOCKET_PATH_BYTES = 107  # sun_path, less its terminator
RUNTIME_ID = re.compile(r"[a-z0-9][-a-z0-9]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one runtime besides what can be observed.

    `process` is None until the runtime has been started; `writer` is the process that keeps its
    log. Both stay None where a container engine does this.
    """

    backend: str
    cluster: str
    runtime_id: str
    function: str
    revision: str
    epoch: int
    device_uuids: tuple[str, ...]
    process: ProcessRef | None = None
    writer: ProcessRef | None = None
    has_exited: bool = False
    exit_code: int | None = None

    def to_json(self) -> str:
        """Return the record as the text of its file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read a record back.

        Raises:
            ValueError: It is not one.
        """
        try:
            fields = json.loads(text)
            for name in ("process", "writer"):
                fields[name] = ProcessRef(**fields[name]) if fields[name] else None
            fields["device_uuids"] = tuple(fields["device_uuids"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a runtime's record: {error!r}") from error


class RuntimeDirectories:
    """The runtime directories of one backend and cluster; other backends may share the root."""

    def __init__(self, root: Path, *, backend: str, cluster: str) -> None:
        self._root = root.absolute()
        self._backend = backend
        self._cluster = cluster

    def path(self, runtime_id: str) -> Path:
        """Return where a runtime's directory is, or would be.

        Raises:
            BackendError: The id is malformed.
        """
        if not RUNTIME_ID.fullmatch(runtime_id):
            raise BackendError(
                f"{runtime_id!r} is no runtime id; it must match {RUNTIME_ID.pattern}"
            )
        return self._root / runtime_id

    def socket(self, runtime_id: str) -> Path:
        """Return where a runtime's socket is, or would be."""
        return self.path(runtime_id) / SOCKET_NAME

    def endpoint(self, runtime_id: str) -> str:
        """Return the gRPC target of a runtime."""
        return f"unix://{self.socket(runtime_id)}"

    def record_of(self, spec: RuntimeSpec) -> Record:
        """Return the record of an intended runtime."""
        return Record(
            backend=self._backend,
            cluster=self._cluster,
            runtime_id=spec.runtime_id,
            function=spec.function,
            revision=spec.revision,
            epoch=spec.epoch,
            device_uuids=spec.device_uuids,
        )

    def info(self, record: Record) -> RuntimeInfo:
        """Return a runtime as callers see it."""
        return RuntimeInfo(
            runtime_id=record.runtime_id,
            function=record.function,
            revision=record.revision,
            epoch=record.epoch,
            phase=RuntimePhase.EXITED if record.has_exited else RuntimePhase.RUNNING,
            endpoint=self.endpoint(record.runtime_id),
            device_uuids=record.device_uuids,
            exit_code=record.exit_code,
        )

    def create(self, record: Record) -> Path:
        """Make a runtime's directory with its record in it, private to this user.

        Raises:
            BackendError: The socket's path would be too long, another backend or cluster has the
                id, or the disk refuses.
        """
        path = self.path(record.runtime_id)
        num_bytes = len(os.fsencode(path / SOCKET_NAME))
        if num_bytes > MAX_SOCKET_PATH_BYTES:
            raise BackendError(
                f"the socket path {str(path / SOCKET_NAME)!r} has {num_bytes} bytes and the kernel"
                f" allows {MAX_SOCKET_PATH_BYTES}; choose a shorter home directory"
            )
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (other := self._read(path)) is not None and not self._owns(other):
                raise BackendError(
                    f"{record.runtime_id!r} is a runtime of backend {other.backend!r} in cluster"
                    f" {other.cluster!r}; use another id or another home directory"
                )
            path.chmod(0o700)
            self.write(record)
        except OSError as error:
            raise BackendError(f"cannot prepare {str(path)!r}: {error}", temporary=True) from error
        return path

    def write(self, record: Record) -> None:
        """Replace a runtime's record, in one step."""
        path = self.path(record.runtime_id) / RECORD_NAME
        staged = path.with_suffix(".tmp")
        staged.write_text(record.to_json())
        staged.replace(path)

    def records(self) -> list[Record]:
        """Return the records of this backend and cluster."""
        if not self._root.is_dir():
            return []
        found = (self._read(path) for path in sorted(self._root.iterdir()) if path.is_dir())
        return [record for record in found if record is not None and self._owns(record)]

    def remove(self, runtime_id: str) -> None:
        """Remove a runtime's directory, if it is of this backend and cluster.

        Raises:
            BackendError: Something in it cannot be removed.
        """
        path = self.path(runtime_id)
        record = self._read(path)
        if record is not None and not self._owns(record):
            return
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BackendError(f"cannot remove {str(path)!r}: {error}", temporary=True) from error

    def _owns(self, record: Record) -> bool:
        return record.backend == self._backend and record.cluster == self._cluster

    def _read(self, path: Path) -> Record | None:
        """Return the record in a directory; None where there is none, or none to make sense of."""
        try:
            return Record.from_json((path / RECORD_NAME).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("unreadable runtime record", path=str(path), error=str(error))
            return None
