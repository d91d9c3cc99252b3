"""Everything a runtime can refuse or fail with, and the gRPC status of each.

RuntimeFault
├── InvalidRequest      INVALID_ARGUMENT     a message that makes no sense, whatever the state
│   └── InvalidSequence INVALID_ARGUMENT     one sequence; others are not affected
├── UnknownSnapshot     NOT_FOUND            the store does not hold it
├── WrongState          FAILED_PRECONDITION  not allowed in the runtime's present state
├── LoadFailed          FAILED_PRECONDITION  this snapshot cannot be loaded with this configuration
├── SnapshotDamaged     DATA_LOSS            the files are not what the manifest says
├── TextFailed          ABORTED              one text could not be embedded; others are not affected
├── OutOfMemory         RESOURCE_EXHAUSTED   weights or KV blocks do not fit
├── StreamOverflow      RESOURCE_EXHAUSTED   the reader of a stream is too slow
├── EngineDied          UNAVAILABLE          the engine ended without being asked
├── ZygoteDied          UNAVAILABLE          no engine can be forked
└── ShuttingDown        UNAVAILABLE          the runtime is stopping

Statuses are names, so that processes without gRPC can import this module.
"""

import errno
from collections.abc import Mapping


class RuntimeFault(Exception):
    """A failure with a gRPC status; the message says what failed, the value, and what to do."""


class InvalidRequest(RuntimeFault):
    """A request that can be accepted in no state."""


class InvalidSequence(InvalidRequest):
    """A sequence that the engine cannot run; no other sequence is affected."""


class UnknownSnapshot(RuntimeFault):
    """The mounted store has no snapshot of this name."""


class WrongState(RuntimeFault):
    """The operation is not allowed in the runtime's present state."""


class LoadFailed(RuntimeFault):
    """The snapshot cannot be loaded with this configuration; trying again does not help."""


class SnapshotDamaged(RuntimeFault):
    """The snapshot's files are not what its manifest says."""


class TextFailed(RuntimeFault):
    """A text could not be embedded, through no fault of its own."""


class OutOfMemory(RuntimeFault):
    """Weights or KV blocks do not fit the memory that is free or allowed."""


class StreamOverflow(RuntimeFault):
    """A stream's reader fell too far behind; its sequences are cancelled."""


class EngineDied(RuntimeFault):
    """The engine process ended without being asked to."""


class ZygoteDied(RuntimeFault):
    """The fork server ended, so that no engine can be started."""


class ShuttingDown(RuntimeFault):
    """The runtime is stopping."""


GRPC_STATUS: Mapping[type[RuntimeFault], str] = {
    InvalidRequest: "INVALID_ARGUMENT",
    InvalidSequence: "INVALID_ARGUMENT",
    UnknownSnapshot: "NOT_FOUND",
    WrongState: "FAILED_PRECONDITION",
    LoadFailed: "FAILED_PRECONDITION",
    SnapshotDamaged: "DATA_LOSS",
    TextFailed: "ABORTED",
    OutOfMemory: "RESOURCE_EXHAUSTED",
    StreamOverflow: "RESOURCE_EXHAUSTED",
    EngineDied: "UNAVAILABLE",
    ZygoteDied: "UNAVAILABLE",
    ShuttingDown: "UNAVAILABLE",
}


# Torch has no class for the first one.
_TORCH_HAS_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")


def as_fault(error: Exception) -> RuntimeFault:
    """Return the fault that stands for an error of the engine or a library."""
    match error:
        case RuntimeFault():
            return error
        case MemoryError() | OSError(errno=errno.ENOMEM):
            return OutOfMemory(f"out of memory: {error}")
        case RuntimeError() if any(phrase in str(error) for phrase in _TORCH_HAS_NO_MEMORY):
            return OutOfMemory(f"out of memory: {error}")
        case _:
            return LoadFailed(f"{type(error).__name__}: {error}")


def encode_fault(fault: RuntimeFault) -> bytes:
    """Return a fault as bytes that `decode_fault` turns back in another process."""
    return f"{type(fault).__name__}\n{fault}".encode()


def decode_fault(data: bytes) -> RuntimeFault:
    """Return a fault of the same class and message as the one that was encoded."""
    name, _, message = data.decode().partition("\n")
    return _BY_NAME[name](message)


_BY_NAME = {fault.__name__: fault for fault in GRPC_STATUS}
