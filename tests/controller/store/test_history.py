"""Transitions, cold starts and usage."""

from dataclasses import asdict, replace

from sqlalchemy import Connection, select

from controller.ledger.intervals import DAY_US
from controller.ledger.report import Served
from controller.store.cold_starts import ColdStarts, StoredColdStart, StoredPhase
from controller.store.tables import cold_starts, transitions, usage
from controller.store.transitions import StoredTransition, Transitions
from controller.store.usage import StoredUsage, Usage

TRANSITION = StoredTransition(
    replica_id="r1",
    function="smol",
    at_us=10,
    from_state=None,
    to_state="starting",
    reason="a request waits",
    epoch=7,
)
COLD_START = StoredColdStart(
    function="smol",
    replica_id="r1",
    started_us=10,
    from_tier="stopped",
    reason="request",
    outcome="ready",
    total_s=1.75,
    phases=(StoredPhase(name="place", seconds=0.25), StoredPhase(name="load", seconds=1.5)),
)
USAGE = StoredUsage(
    request_id="req-1",
    function="smol",
    replica_id="r1",
    key_id=None,
    started_us=10,
    tier="parked",
    queue_s=0.5,
    first_token_s=0.75,
    duration_s=2.0,
    num_prompt_tokens=11,
    num_cached_tokens=4,
    num_output_tokens=5,
    outcome="stop",
)


def test_transitions_are_written_as_they_are(connection: Connection) -> None:
    later = replace(TRANSITION, at_us=20, from_state="starting", to_state="loading")
    Transitions(connection).add([TRANSITION, later])
    rows = connection.execute(select(transitions).order_by(transitions.c.id)).mappings()
    assert [{**row, "id": None} for row in rows] == [
        {**asdict(move), "id": None} for move in (TRANSITION, later)
    ]


def test_cold_starts_come_back_with_their_phases_in_order(connection: Connection) -> None:
    ColdStarts(connection).add([COLD_START, replace(COLD_START, started_us=20, function="other")])
    newest, oldest = ColdStarts(connection).latest(limit=5)
    assert (newest.started_us, oldest.started_us) == (20, 10)
    assert replace(oldest, id=None) == COLD_START
    assert newest.id != oldest.id


def test_cold_starts_of_one_function(connection: Connection) -> None:
    ColdStarts(connection).add([COLD_START, replace(COLD_START, function="other")])
    (found,) = ColdStarts(connection).latest(function="other", limit=5)
    assert found.function == "other"


def test_usage_is_summed_between_two_moments(connection: Connection) -> None:
    rows = [replace(USAGE, started_us=at, request_id=f"req-{at}") for at in (5, 10, 20)]
    Usage(connection).add(rows)
    (served,) = Usage(connection).served(5, 20)
    assert served.num_requests == 2


def test_usage_is_summed_by_function_replica_and_day(connection: Connection) -> None:
    Usage(connection).add(
        [
            USAGE,
            replace(USAGE, started_us=20),
            replace(USAGE, started_us=DAY_US + 1),
            replace(USAGE, replica_id=None, num_output_tokens=0),
        ]
    )
    served = Usage(connection).served(0, 2 * DAY_US)

    def line(replica: str | None, day: int, requests: int, output: int) -> Served:
        return Served(
            function="smol",
            replica_id=replica,
            day=day,
            num_requests=requests,
            num_prompt_tokens=11 * requests,
            num_output_tokens=output,
        )

    expected = [line(None, 0, 1, 0), line("r1", 0, 2, 10), line("r1", 1, 1, 5)]
    assert sorted(served, key=repr) == sorted(expected, key=repr)


def test_adding_nothing_is_harmless(connection: Connection) -> None:
    Transitions(connection).add([])
    ColdStarts(connection).add([])
    Usage(connection).add([])


def test_old_history_can_be_forgotten(connection: Connection) -> None:
    Transitions(connection).add([TRANSITION, replace(TRANSITION, at_us=20)])
    ColdStarts(connection).add([COLD_START, replace(COLD_START, started_us=20)])
    Usage(connection).add([USAGE, replace(USAGE, started_us=20)])
    assert Transitions(connection).prune(20) == 1
    assert ColdStarts(connection).prune(20) == 1
    assert Usage(connection).prune(20) == 1
    moments = (transitions.c.at_us, cold_starts.c.started_us, usage.c.started_us)
    assert [list(connection.execute(select(at)).scalars()) for at in moments] == [[20]] * 3
