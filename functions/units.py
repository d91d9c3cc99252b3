"""Durations and sizes as people write them, and back.

A duration is seconds as a float, a size is bytes as an int. Nothing here knows the spec.
"""

import math
import re
from decimal import Decimal

MAX_DURATION_S = 365 * 86_400.0
MAX_SIZE_BYTES = 2**63 - 1

DURATION_PATTERN = (
    r"^(?=\d)(\d+(\.\d+)?d)?(\d+(\.\d+)?h)?(\d+(\.\d+)?m)?(\d+(\.\d+)?s)?(\d+(\.\d+)?ms)?$"
)
SIZE_PATTERN = r"^\d+(\.\d+)?\s*([kKmMgGtT]i?)?[bB]?$"

_DURATION_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_SIZE_BYTES = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)},
}
_DURATION = re.compile(DURATION_PATTERN, re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms])", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?)b?", re.ASCII | re.IGNORECASE)
_MAX_CHARS = 40


def parse_duration(value: object) -> float:
    """Return seconds from `1h30m`, `5m`, `90s`, `250ms`, or a number of seconds.

    Raises:
        ValueError: It is not a duration, or outside 0 to 365 days.
    """
    seconds = _duration_s(value)
    if seconds is None:
        raise ValueError("must be a duration such as 250ms, 90s, 5m, 1h30m, or a number of seconds")
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError("must be a duration between 0 and 365d")
    return seconds


def _duration_s(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else math.inf
    if not isinstance(value, str) or len(value) > _MAX_CHARS:
        return None
    text = value.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)
    if not _DURATION.fullmatch(text):
        return None
    parts = _DURATION_PART.findall(text)
    return math.fsum(float(number) * _DURATION_S[unit] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """Return the shortest exact spelling that `parse_duration` reads back, e.g. `1h30m`."""
    milliseconds = round(seconds * 1000)
    if milliseconds == 0:
        return "0s"
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, milliseconds = divmod(milliseconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size(value: object) -> int:
    """Return bytes from `24Gi`, `512MiB`, `1G`, `100 MB`, or a number of bytes.

    Raises:
        ValueError: It is not a size, or does not fit 63 bits.
    """
    size = _size_bytes(value)
    if size is None:
        raise ValueError("must be a size such as 24Gi, 512MiB, 1G, or a number of bytes")
    if not 0 <= size <= MAX_SIZE_BYTES:
        raise ValueError("must be a size between 0 and 8388607Ti")
    return size


def _size_bytes(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if not isinstance(value, str) or len(value) > _MAX_CHARS:
        return None
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        return None
    number, unit = match.groups()
    return int(Decimal(number) * _SIZE_BYTES[unit.lower()])


def format_size(num_bytes: int) -> str:
    """Return an exact spelling that `parse_size` reads back, e.g. `24Gi`."""
    for power, unit in ((4, "Ti"), (3, "Gi"), (2, "Mi"), (1, "Ki")):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{unit}"
    return str(num_bytes)
