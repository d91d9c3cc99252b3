from datetime import UTC, datetime
from decimal import Decimal

from controller.ledger.intervals import DAY_US, HOUR_US, WHOLE_PPM, LedgerState
from controller.ledger.report import (
    CostReport,
    Deployed,
    DeviceTime,
    Figures,
    GroupBy,
    Served,
    build_report,
)

DAY = 20_000
START_US = DAY * DAY_US
WHOLE_HOUR = HOUR_US * WHOLE_PPM
S = LedgerState
D = Decimal


def held(
    state: LedgerState,
    hours: float,
    *,
    function: str | None = "smol",
    replica: str | None = "r1",
    device: str = "gpu0",
    day: int = DAY,
    rate: str = "2.00",
) -> DeviceTime:
    return DeviceTime(
        device=device,
        function=function,
        replica_id=replica,
        state=state,
        rate_usd_per_hour=Decimal(rate),
        day=day,
        device_time=round(hours * WHOLE_HOUR),
    )


def served(function: str, replica: str | None, requests: int, day: int = DAY) -> Served:
    return Served(
        function=function,
        replica_id=replica,
        day=day,
        num_requests=requests,
        num_prompt_tokens=10 * requests,
        num_output_tokens=3 * requests,
    )


def deployed(
    function: str, from_h: float, until_h: float | None = None, **more: object
) -> Deployed:
    return Deployed(
        function=function,
        from_us=START_US + round(from_h * HOUR_US),
        until_us=None if until_h is None else START_US + round(until_h * HOUR_US),
        num_devices=int(str(more.get("devices", 1))),
        rate_usd_per_hour=Decimal(str(more["rate"])) if "rate" in more else None,
    )


def report(
    *,
    by: GroupBy = GroupBy.FUNCTION,
    hours: int = 24,
    times: tuple[DeviceTime, ...] = (),
    requests: tuple[Served, ...] = (),
    deployments: tuple[Deployed, ...] = (),
) -> CostReport:
    figures = Figures(
        since_us=START_US,
        until_us=START_US + hours * HOUR_US,
        device_times=times,
        served=requests,
        deployed=deployments,
    )
    return build_report(figures, by=by, default_rate=Decimal("4.00"))


def test_idle_and_active_money_are_told_apart() -> None:
    (row,) = report(times=(held(S.ACTIVE, 1), held(S.IDLE, 3), held(S.LOADING, 0.5))).rows
    assert (row.active_usd, row.idle_usd, row.other_usd) == (D(2), D(6), D(1))
    assert row.cost_usd == 9


def test_parked_and_unallocated_time_costs_no_function() -> None:
    rows = report(
        times=(held(S.PARKED, 5), held(S.UNALLOCATED, 2, function=None, replica=None))
    ).rows
    assert [(row.group, row.cost_usd, row.given_back_usd) for row in rows] == [
        ("smol", D(0), D(10)),
        (None, D(0), D(4)),
    ]


def test_total_is_the_sum_of_each_column() -> None:
    times = tuple(
        held(state, 1 / 3 + index, function=f"f{index % 3}", rate="0.37")
        for index, state in enumerate(LedgerState)
        if state is not S.UNALLOCATED
    )
    told = report(times=times, deployments=(deployed("f1", 1.7, rate="0.37"),))
    for column in ("cost_usd", "active_usd", "idle_usd", "given_back_usd", "always_on_usd"):
        assert getattr(told.total, column) == sum(getattr(row, column) for row in told.rows)
    for state in LedgerState:
        assert told.total.seconds[state] == sum(row.seconds[state] for row in told.rows)


def test_rows_are_sorted_and_nobodys_time_comes_last() -> None:
    rows = report(
        times=(
            held(S.UNALLOCATED, 1, function=None, replica=None),
            held(S.IDLE, 1, function="b"),
            held(S.IDLE, 1, function="a"),
        )
    ).rows
    assert [row.group for row in rows] == ["a", "b", None]


def test_always_on_counts_from_the_deployment_at_the_functions_rate_and_devices() -> None:
    told = report(deployments=(deployed("smol", 20, rate="3.00", devices=2),))
    assert told.rows[0].always_on_usd == 4 * 3 * 2


def test_always_on_without_a_rate_takes_the_nodes() -> None:
    assert report(deployments=(deployed("smol", 0),)).total.always_on_usd == 24 * 4


def test_always_on_ends_with_the_deletion() -> None:
    assert report(deployments=(deployed("smol", 0, 6),)).total.always_on_usd == 6 * 4


def test_always_on_starts_with_the_report_for_older_deployments() -> None:
    assert report(deployments=(deployed("smol", -100),)).total.always_on_usd == 24 * 4


def test_revisions_add_up_each_at_its_own_rate() -> None:
    told = report(
        deployments=(deployed("smol", 0, 10, rate="1.00"), deployed("smol", 10, rate="2.00"))
    )
    assert told.rows[0].always_on_usd == 10 + 14 * 2


def test_days_split_always_on_at_midnight() -> None:
    told = report(by=GroupBy.DAY, hours=48, deployments=(deployed("smol", 18),))
    assert [(row.group, row.always_on_usd) for row in told.rows] == [
        ("2024-10-04", D(6 * 4)),
        ("2024-10-05", D(24 * 4)),
    ]


def test_days_group_time_and_requests() -> None:
    told = report(
        by=GroupBy.DAY,
        hours=48,
        times=(held(S.ACTIVE, 1), held(S.ACTIVE, 2, day=DAY + 1)),
        requests=(served("smol", "r1", 5), served("smol", None, 2, DAY + 1)),
    )
    assert [(row.seconds[S.ACTIVE], row.num_requests) for row in told.rows] == [
        (D(3600), 5),
        (D(7200), 2),
    ]


def test_always_on_of_a_device_is_all_its_time() -> None:
    told = report(
        by=GroupBy.DEVICE,
        times=(held(S.ACTIVE, 1), held(S.UNALLOCATED, 2, function=None, replica=None, rate="1.00")),
        deployments=(deployed("smol", 0),),
    )
    assert [(row.group, row.always_on_usd) for row in told.rows] == [("gpu0", D(2 + 2))]
    assert told.rows[0].cost_usd + told.rows[0].given_back_usd == told.rows[0].always_on_usd


def test_request_on_two_devices_is_in_both_rows_and_once_in_the_total() -> None:
    told = report(
        by=GroupBy.DEVICE,
        times=(held(S.ACTIVE, 1), held(S.ACTIVE, 1, device="gpu1")),
        requests=(served("smol", "r1", 5), served("smol", None, 2)),
    )
    assert [(row.group, row.num_requests) for row in told.rows] == [("gpu0", 5), ("gpu1", 5)]
    assert told.total.num_requests == 7


def test_refused_requests_show_under_their_function() -> None:
    (row,) = report(requests=(served("smol", None, 2),)).rows
    assert (row.group, row.num_requests, row.num_prompt_tokens, row.num_output_tokens) == (
        "smol",
        2,
        20,
        6,
    )


def test_json_has_decimals_as_plain_strings() -> None:
    told = report(times=(held(S.ACTIVE, 0.5),)).to_json()
    assert told["since"] == datetime(2024, 10, 4, tzinfo=UTC).isoformat()
    assert told["rows"][0] == {
        "group": "smol",
        "starting_s": "0",
        "loading_s": "0",
        "active_s": "1800",
        "idle_s": "0",
        "draining_s": "0",
        "failed_s": "0",
        "parked_s": "0",
        "unallocated_s": "0",
        "cost_usd": "1.000000000",
        "active_cost_usd": "1.000000000",
        "idle_cost_usd": "0.000000000",
        "given_back_usd": "0.000000000",
        "always_on_cost_usd": "0.000000000",
        "requests": 0,
        "prompt_tokens": 0,
        "output_tokens": 0,
    }
    assert told["total"]["group"] is None


def test_empty_report_has_a_total_of_nothing() -> None:
    told = report()
    assert told.rows == ()
    assert told.total.cost_usd == 0
