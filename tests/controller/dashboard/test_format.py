from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from controller.dashboard.format import (
    human_age,
    human_bytes,
    human_count,
    human_seconds,
    human_share,
    human_usd,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (512 << 20, "512 MiB"),
        (3 << 29, "1.5 GiB"),
        (141 << 30, "141 GiB"),
        (1 << 70, "1048576 PiB"),
    ],
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert human_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-1, "0 s"),
        (0.0001, "<1 ms"),
        (0.0853, "85 ms"),
        (0.9996, "1.00 s"),
        (3.214, "3.21 s"),
        (12.34, "12.3 s"),
        (59.96, "1 m 00 s"),
        (245, "4 m 05 s"),
        (3600, "1 h 00 m"),
        (7800, "2 h 10 m"),
        (273_600, "3 d 4 h"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "$0"),
        ("0.00001", "<$0.0001"),
        ("0.0042", "$0.0042"),
        ("0.01", "$0.01"),
        ("1204.5", "$1,204.50"),
        ("-3", "-$3.00"),
        ("-0.00001", "-<$0.0001"),
    ],
)
def test_usd(amount: str, text: str) -> None:
    assert human_usd(Decimal(amount)) == text


def test_count_separates_thousands() -> None:
    assert human_count(1_218_000) == "1,218,000"


def test_share_of_nothing_is_a_dash() -> None:
    assert human_share(Decimal(1), Decimal(3)) == "33 %"
    assert human_share(Decimal(0), Decimal(0)) == "—"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3_599, "59 min ago"),
        (7_200, "2 h ago"),
        (200_000, "2 d ago"),
    ],
)
def test_age(seconds: int, text: str) -> None:
    now = datetime(2026, 3, 2, tzinfo=UTC)
    assert human_age(now - timedelta(seconds=seconds), now) == text
