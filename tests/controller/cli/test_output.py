import pytest

from controller.cli.output import clean, human_bytes, human_moment, human_seconds, human_usd


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (1 << 60, "1048576.0 TiB")],
)  # fmt: skip
def test_sizes_read_well(num_bytes: int | None, text: str) -> None:
    assert human_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0 s"), (0.0004, "0 ms"), (0.34, "340 ms"), (0.9996, "1.0 s"),
        (12.34, "12.3 s"), (59.96, "1m 00s"), (245, "4m 05s"), (12_000, "3h 20m"),
        (183_600, "2d 03h"),
    ],
)  # fmt: skip
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert human_seconds(seconds) == text


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b]0;x\x07b\n\tc\u202e") == "a]0;xb\n\tc"


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (None, "-"),
        ("2026-01-31T08:00:00.123456+00:00", "2026-01-31 08:00:00 UTC"),
        ("2026-01-31T01:00:00+02:00", "2026-01-30 23:00:00 UTC"),
        ("2026-01-31T08:00:00Z", "2026-01-31 08:00:00 UTC"),
    ],
)
def test_moments_are_shown_in_utc(moment: str | None, text: str) -> None:
    assert human_moment(moment) == text


def test_money_is_shown_to_a_hundredth_of_a_cent() -> None:
    assert human_usd("0.006114712") == "0.0061"
