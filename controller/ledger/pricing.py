"""Device time to seconds and money, exact until it is rounded once. Pure.

Device time is counted in whole microseconds times millionths of a device.
"""

from collections.abc import Iterable
from decimal import Decimal, localcontext

from controller.ledger.intervals import HOUR_US, WHOLE_PPM

NANO_USD = Decimal("1e-9")
_DIGITS = 60  # far more than any sum of int64 device time times a price has


def device_seconds(device_time: int) -> Decimal:
    """Return device time in seconds, exactly."""
    with localcontext(prec=_DIGITS):
        return Decimal(device_time).scaleb(-12).normalize()


def usd(priced: Iterable[tuple[int, Decimal]]) -> Decimal:
    """Return what pieces of device time cost together, rounded once to a billionth of a dollar.

    Args:
        priced: Pairs of device time and the price of a whole device for an hour.
    """
    with localcontext(prec=_DIGITS):
        total = sum((time * rate for time, rate in priced), start=Decimal(0))
        return (total / (HOUR_US * WHOLE_PPM)).quantize(NANO_USD)
