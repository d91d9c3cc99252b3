"""Figures as people read them. Units are always said."""

from datetime import datetime, timedelta
from decimal import Decimal

NOTHING = "—"
"""Stands where there is no figure."""

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_CENT = Decimal("0.01")
_SMALLEST_USD = Decimal("0.0001")


def human_bytes(num_bytes: int) -> str:
    """Return a size in binary units: 0 B, 512 MiB, 1.5 GiB."""
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit < len(_BYTE_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    digits = 1 if unit > 0 and size < 10 else 0
    return f"{size:.{digits}f} {_BYTE_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """Return a duration with about three digits: 0 s, 85 ms, 3.21 s, 4 m 05 s, 2 h 10 m, 3 d 4 h."""
    if seconds <= 0:
        return "0 s"
    if seconds < 0.0005:
        return "<1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = timedelta(seconds=round(seconds))
    hours, minutes = divmod(whole.seconds // 60, 60)
    if whole.days:
        return f"{whole.days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} m"
    return f"{minutes} m {whole.seconds % 60:02d} s"


def human_usd(amount: Decimal) -> str:
    """Return dollars; small amounts keep two significant digits: $1,204.50, $0.0042."""
    sign, size = ("-" if amount < 0 else ""), abs(amount)
    if size == 0:
        return "$0"
    if size < _SMALLEST_USD:
        return f"{sign}<$0.0001"
    if size < _CENT:
        return f"{sign}${size:.4f}"
    return f"{sign}${size:,.2f}"


def human_count(number: int) -> str:
    """Return a number with thousands separated."""
    return f"{number:,}"


def human_share(part: Decimal, whole: Decimal) -> str:
    """Return a percentage, or a dash when there is no whole."""
    return f"{100 * part / whole:.0f} %" if whole else NOTHING


def human_age(moment: datetime, now: datetime) -> str:
    """Return how long ago a moment was, in one unit."""
    seconds = max((now - moment).total_seconds(), 0.0)
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (86_400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // divisor:.0f} {unit} ago"
    return f"{seconds // 86_400:.0f} d ago"
