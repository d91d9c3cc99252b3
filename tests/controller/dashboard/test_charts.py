import sys
from xml.etree import ElementTree

import pytest

from controller.dashboard.charts import HATCH_ID, BarChart, Series

SVG = "{http://www.w3.org/2000/svg}"


def chart(*series: Series, bars: tuple[str, ...] = ("smol", "qwen")) -> ElementTree.Element:
    drawn = BarChart(
        id="time", title="Device time", description="In words", bars=bars, series=series
    ).render(width=560)
    return ElementTree.fromstring(drawn)


def series(kind: str, *values: float) -> Series:
    return Series(
        kind=kind, label=kind, values=values, texts=[f"{value:g} hours" for value in values]
    )


def bar_titles(root: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in root.iter(SVG + "title")][1:]


def rects(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    (group,) = [one for one in root.iter(SVG + "g") if one.get("class") == f"series {kind}"]
    return list(group.iter(SVG + "rect"))


def test_chart_has_a_name_and_a_description() -> None:
    root = chart(series("active", 1, 2))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "time-560-title time-560-desc"
    by_id = {element.get("id"): element.text for element in root}
    assert by_id["time-560-title"] == "Device time"
    assert by_id["time-560-desc"] == "In words"


def test_nothing_in_it_needs_a_script_a_style_or_the_network() -> None:
    root = chart(series("active", 1, 2))
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"script", "style", "image", "a", "foreignObject"}
    assert not [element for element in root.iter() if element.get("style")]
    assert "//" not in ElementTree.tostring(root, encoding="unicode").replace(SVG[1:-1], "")


def test_each_bar_says_what_it_is_with_its_whole_name() -> None:
    name = "a-very-long-function-name-that-goes-on"
    root = chart(series("active", 1, 2), bars=(name, "qwen"))
    assert sorted(bar_titles(root)) == [f"{name}: active 1 hours", "qwen: active 2 hours"]
    assert "a-very-long-function-na…" in [text.text for text in root.iter(SVG + "text")]


def test_first_bar_is_on_top() -> None:
    root = chart(series("active", 1, 2))
    (group,) = [one for one in root.iter(SVG + "g") if one.get("class") == "series active"]
    tops = {
        bar[-1].text: float(bar[0].get("y", 0))
        for bar in group.iter(SVG + "g")
        if bar.get("class") == "bar"
    }
    assert tops["smol: active 1 hours"] < tops["qwen: active 2 hours"]


def test_bars_stack_to_scale() -> None:
    root = chart(series("active", 1, 0), series("idle", 3, 2))
    (active,) = rects(root, "active")
    widths = sorted(float(rect.get("width", 0)) for rect in rects(root, "idle"))
    assert widths == pytest.approx(
        [2 * float(active.get("width", 0)), 3 * float(active.get("width", 0))]
    )
    ends = float(active.get("x", 0)) + float(active.get("width", 0))
    assert [rect for rect in rects(root, "idle") if float(rect.get("x", 0)) == pytest.approx(ends)]


def test_bar_without_length_is_not_drawn() -> None:
    root = chart(series("active", 1, 0))
    assert len(rects(root, "active")) == 1
    assert bar_titles(root) == ["smol: active 1 hours"]


def test_idle_bars_are_hatched_and_others_are_not() -> None:
    root = chart(series("active", 1, 2), series("idle", 3, 4))
    assert {rect.get("fill") for rect in rects(root, "idle")} == {f"url(#{HATCH_ID})"}
    assert {rect.get("fill") for rect in rects(root, "active")} == {None}


def test_chart_of_nothing_but_zeros_is_drawn_empty() -> None:
    assert bar_titles(chart(series("active", 0, 0), series("idle", 0, 0))) == []


def test_names_are_escaped() -> None:
    drawn = BarChart(
        id="time",
        title="<b>",
        description="&",
        bars=["<script>alert(1)</script>"],
        series=[series("active", 1)],
    ).render(width=340)
    assert "<script" not in drawn
    assert "<b>" not in drawn


def test_drawing_leaves_no_import_hook_behind() -> None:
    assert all(hasattr(finder, "find_spec") for finder in sys.meta_path)
