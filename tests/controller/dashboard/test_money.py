from datetime import timedelta
from typing import Any

from controller.dashboard.money import Grouping, charts, cost_lines
from tests.fakes.dashboard import NOW, FakeHouse


async def report(house: FakeHouse | None = None, by: str = "function") -> dict[str, Any]:
    source = house or FakeHouse()
    return await source.cost(since=NOW - timedelta(hours=24), until=NOW, by=by)


async def test_cost_lines_end_with_the_total_and_name_nobody() -> None:
    told = await report()
    told["rows"].append(told["rows"][0] | {"group": None, "unallocated_s": "60"})
    lines = cost_lines(told)
    assert [one.group for one in lines] == [
        "mistral-small",
        "qwen3-8b",
        "smollm2",
        "nobody",
        "Total",
    ]
    assert lines[3].given_back == "1 m 00 s"
    assert lines[-1].cost == "$19.68"


async def test_charts_put_the_dearest_first_and_say_what_did_not_fit() -> None:
    house = FakeHouse()
    house.hours = {f"f{index:02}": (float(index), 1.0) for index in range(20)}
    (time, money), num_hidden = charts(await report(house), Grouping.FUNCTION)
    assert time.bars[0] == "f19"
    assert len(time.bars) == 8
    assert num_hidden == 12
    assert money.bars[:2] == ["f19", "if always on"]


async def test_charts_of_days_are_in_the_order_of_the_days() -> None:
    told = await report(by="day")
    row = told["rows"][-1]
    days = ["2026-03-01", "2026-03-02", "2026-03-03"]
    told["rows"] = [
        row | {"group": day, "cost_usd": str(index)} for index, day in enumerate(reversed(days))
    ][::-1]
    (time, _), _ = charts(told, Grouping.DAY)
    assert list(time.bars) == days


async def test_time_is_shown_in_a_fitting_unit() -> None:
    house = FakeHouse()
    house.hours = {"smol": (1.0, 2.0)}
    (time, _), _ = charts(await report(house), Grouping.FUNCTION)
    assert time.title == "Device time, hours"
    assert time.series[0].values == [1.0]
    assert time.series[1].texts == ["2 h 00 m"]
    house.hours = {"smol": (0.001, 0.0)}
    (time, _), _ = charts(await report(house), Grouping.FUNCTION)
    assert time.title == "Device time, minutes"


async def test_little_time_is_shown_in_seconds() -> None:
    house = FakeHouse()
    house.hours = {"smol": (0.001, 0.0)}
    told = await report(house)
    told["rows"][0]["loading_s"] = "0"
    (time, _), _ = charts(told, Grouping.FUNCTION)
    assert time.title == "Device time, seconds"
    assert time.series[0].values == [3.6]


async def test_money_chart_has_always_on_beside_each_cost() -> None:
    (_, money), _ = charts(await report(), Grouping.FUNCTION)
    by_kind = {series.kind: list(series.values) for series in money.series}
    assert by_kind["active"] == [8.0, 0, 1.0, 0, 0.05, 0]
    assert by_kind["always-on"] == [0, 60.0, 0, 60.0, 0, 60.0]
    assert "qwen3-8b: $11.62, of it idle $3.50, always on $60.00" in money.description


async def test_no_time_gives_no_charts() -> None:
    house = FakeHouse()
    house.hours = {}
    assert charts(await report(house), Grouping.FUNCTION) == ((), 0)
