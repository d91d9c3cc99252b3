from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from controller.ledger.intervals import HOUR_US, WHOLE_PPM
from controller.ledger.pricing import device_seconds, usd

WHOLE_HOUR = HOUR_US * WHOLE_PPM


def test_an_hour_costs_its_rate() -> None:
    assert usd([(WHOLE_HOUR, Decimal("2.50"))]) == Decimal("2.50")


def test_nothing_costs_nothing() -> None:
    assert usd([]) == 0


def test_a_third_of_a_device_for_a_second() -> None:
    assert device_seconds(1_000_000 * 333_333) == Decimal("0.333333")


def test_money_is_rounded_once_and_not_per_piece() -> None:
    piece = (WHOLE_PPM, Decimal("0.01"))  # a microsecond, worth 0.003 nano-dollars
    assert usd([piece]) == 0
    assert usd([piece] * 10_000) == Decimal("0.000000028")


@given(st.lists(st.integers(0, 2**62), max_size=20))
def test_seconds_are_exact(times: list[int]) -> None:
    assert sum(map(device_seconds, times), Decimal(0)) * 10**12 == sum(times)


@given(st.lists(st.tuples(st.integers(0, 2**62), st.decimals(0, 1000, places=4)), max_size=20))
def test_order_of_the_pieces_changes_no_money(pieces: list[tuple[int, Decimal]]) -> None:
    assert usd(pieces) == usd(reversed(pieces))
