import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("90s", 90.0),
        ("250ms", 0.25),
        ("1m500ms", 60.5),
        ("1.5h", 5400.0),
        ("1d", 86_400.0),
        ("0", 0.0),
        ("0s", 0.0),
        (" 2.5 ", 2.5),
        (0, 0.0),
        (300, 300.0),
        (0.25, 0.25),
    ],
)
def test_duration_is_read_as_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "", "m", "5 m", "5mm", "30m1h", "-5m", "5m-", "1h 30m", "5min", "1e3s", "\u0665m",
        "5M", "9" * 50, True, False, None, [], -1, float("nan"), float("inf"), 1e300, "400d",
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(value)


@given(st.integers(0, 365 * 86_400_000))
def test_formatted_duration_reads_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24Gi", 24 << 30),
        ("24GiB", 24 << 30),
        ("512MiB", 512 << 20),
        ("1G", 10**9),
        ("100 MB", 10**8),
        ("1.5Gi", 3 << 29),
        ("64ki", 64 << 10),
        ("0", 0),
        ("1024", 1024),
        ("7b", 7),
        (4096, 4096),
    ],
)
def test_size_is_read_as_bytes(text: object, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "value",
    ["", "Gi", "-1", "1Pi", "1GG", "1 G i", "1e9", "0x10", "\uff19G", True, None, 1.5, -1, 2**63, "9" * 50],
)  # fmt: skip
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(value)


@given(st.integers(0, 2**62))
def test_formatted_size_reads_back(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes
