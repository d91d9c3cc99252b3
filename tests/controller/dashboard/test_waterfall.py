import pytest

from controller.dashboard.waterfall import cold_start_lines, phase_kind
from tests.fakes.dashboard import FROM_NOTHING, FROM_PARKED, NOW, cold_start


def test_waterfalls_share_one_scale_and_have_no_gaps() -> None:
    slow, fast = cold_start_lines(
        [cold_start(1, "smol", FROM_NOTHING), cold_start(2, "smol", FROM_PARKED)], NOW
    )
    assert slow.phases[-1].x + slow.phases[-1].width == pytest.approx(1000, abs=0.1)
    assert sum(phase.width for phase in fast.phases) == pytest.approx(
        1000 * fast_total() / slow_total(), abs=0.1
    )
    for before, after in zip(slow.phases, slow.phases[1:], strict=False):
        assert after.x == pytest.approx(before.x + before.width, abs=0.02)


def slow_total() -> float:
    return sum(seconds for _, seconds in FROM_NOTHING)


def fast_total() -> float:
    return sum(seconds for _, seconds in FROM_PARKED)


def test_phases_too_short_to_see_are_listed_together() -> None:
    (told,) = cold_start_lines([cold_start(1, "smol", FROM_NOTHING)], NOW)
    unlisted = [phase.name for phase in told.phases if not phase.is_listed]
    assert unlisted == ["place", "attach"]
    assert told.rest == "5 ms"


def test_a_phase_that_moves_weights_tells_how_fast() -> None:
    (told,) = cold_start_lines([cold_start(1, "smol", FROM_NOTHING)], NOW)
    by_name = {phase.name: phase.duration for phase in told.phases}
    assert by_name["weights read"].endswith(" at 41.2 GB/s")
    assert "GB/s" not in by_name["first token"]


def test_cold_start_without_short_phases_has_no_rest() -> None:
    (told,) = cold_start_lines([cold_start(1, "smol", [("place", 1.0), ("graphs", 2.0)])], NOW)
    assert told.rest == ""


def test_cold_start_tells_when_how_and_what_became_of_it() -> None:
    (told,) = cold_start_lines([cold_start(1, "smol", FROM_PARKED, outcome="failed")], NOW)
    assert (told.age, told.clock) == ("8 min ago", "2026-03-02 11:52:00 UTC")
    assert told.is_failed


def test_cold_start_of_no_length_is_drawn_without_dividing_by_zero() -> None:
    (told,) = cold_start_lines([cold_start(1, "smol", [("place", 0.0)])], NOW)
    assert told.phases[0].width == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("place", "wait"),
        ("container_start", "start"),
        ("runtime_import", "import"),
        ("weights_read", "weights"),
        ("weights_verify", "weights"),
        ("kv_alloc", "prepare"),
        ("first_token", "first"),
        ("something new", "prepare"),
    ],
)
def test_phase_has_a_colour(name: str, kind: str) -> None:
    assert phase_kind(name) == kind
