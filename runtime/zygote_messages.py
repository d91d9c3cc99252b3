"""What a zygote tells the runtime server: JSON over a SOCK_SEQPACKET pair, one message a packet.

Ready comes once, then Forked or ForkRefused for each request in order, Exited for each engine.
Requests wait, and so do exits, between Preparing and Prepared, which come at most once. A request
is a packet with two descriptors: the engine's socket and the pipe for its output.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

MAX_MESSAGE_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Everything is imported; forks are cheap from now on."""

    import_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparing:
    """Nobody has asked for a while, so work begins that makes later starts faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """That work is over, done or not; what was asked meanwhile is answered now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """The oldest open request became this process."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRefused:
    """The oldest open request cannot be met."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """An engine ended; `status` is what `os.waitpid` returned."""

    pid: int
    status: int


ZygoteMessage = Ready | Preparing | Prepared | Forked | ForkRefused | Exited
_MESSAGES: Mapping[str, type[ZygoteMessage]] = {
    type_.__name__: type_ for type_ in (Ready, Preparing, Prepared, Forked, ForkRefused, Exited)
}


def encode_message(message: ZygoteMessage) -> bytes:
    """Return a message as one packet."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode()


def decode_message(packet: bytes) -> ZygoteMessage:
    """Return the message in a packet of `encode_message`."""
    fields = json.loads(packet)
    return _MESSAGES[fields.pop("type")](**fields)
