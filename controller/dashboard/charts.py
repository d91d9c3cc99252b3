"""Bar charts as SVG, drawn on the server, without scripts or styles of their own.

Colours and fonts come from the page's stylesheet, so that the charts follow light and dark. What
pygal would show by script is a `<title>` on each bar, which every browser shows by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import pygal
from markupsafe import Markup
from pygal.etree import etree
from pygal.style import Style

etree.to_etree()  # the standard library's tree, also where lxml is installed

HATCH_ID = "hatch-idle"  # defined once in the page
_ROW_HEIGHT = 28
_FRAME_HEIGHT = 48
_NARROW = 480
_UNWANTED = frozenset({"style", "script", "title", "desc"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One colour of a chart.

    Attributes:
        kind: active, idle, other or always-on; the stylesheet's name for the colour.
        values: One a bar; None draws nothing.
        texts: What each bar's tooltip says.
    """

    kind: str
    label: str
    values: Sequence[float | None]
    texts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Horizontal stacked bars, the first one on top.

    Attributes:
        id: Unique in the page.
        description: The chart in words, for those who cannot see it.
    """

    id: str
    title: str
    description: str
    bars: Sequence[str]
    series: Sequence[Series]

    def render(self, *, width: int) -> Markup:
        """Return the chart as an SVG element for a width in CSS pixels."""
        chart = pygal.HorizontalStackedBar(
            style=Style(label_font_size=12, major_label_font_size=12),
            js=(),
            css=(),
            width=width,
            height=_FRAME_HEIGHT + _ROW_HEIGHT * len(self.bars),
            explicit_size=False,
            disable_xml_declaration=True,
            no_prefix=True,
            show_legend=False,
            truncate_label=24 if width > _NARROW else 14,
            min_scale=2,
            max_scale=8 if width > _NARROW else 4,
            margin=4,
            spacing=8,
            value_formatter=lambda value: f"{value:g}",
        )
        chart.x_labels = list(reversed(self.bars))
        for series in self.series:
            chart.add(series.label, _values(series))
        chart.add_xml_filter(lambda root: self._as_ours(root, f"{self.id}-{width}"))
        # pygal escapes every text; ElementTree writes the result.
        return Markup(chart.render(is_unicode=True))

    def _as_ours(self, root: Element, element_id: str) -> Element:
        """Rework pygal's tree: names for screen readers, our class names, nothing inline."""
        for plot in root.iter("g"):
            kind = plot.get("class", "").partition("serie-")[2].partition(" ")[0]
            if kind:
                series = self.series[int(kind)]
                plot.set("class", f"series {series.kind}")
                _name_bars(plot, series)
        _strip(root)
        root.attrib.update(
            {
                "id": element_id,
                "class": "chart",
                "role": "img",
                "aria-labelledby": f"{element_id}-title {element_id}-desc",
            }
        )
        for index, (tag, text) in enumerate((("title", self.title), ("desc", self.description))):
            root.insert(index, _text(tag, text, id=f"{element_id}-{tag}"))
        return root


def _values(series: Series) -> list[object]:
    pairs = zip(reversed(series.values), reversed(series.texts), strict=True)
    return [
        None if value is None else {"value": value, "formatter": lambda _, text=text: text}
        for value, text in pairs
    ]


def _name_bars(plot: Element, series: Series) -> None:
    for bar in plot.iter("g"):
        if bar.get("class") != "bar":
            continue
        said = {desc.get("class"): desc.text or "" for desc in bar.iter("desc")}
        name = f"{said.get('x_label', '')}: {series.label} {said.get('value', '')}"
        bar.append(_text("text-alternative", name))
        for rect in bar.iter("rect"):
            if float(rect.get("width", 0)) == 0:
                bar.clear()
            elif series.kind == "idle":
                rect.set("fill", f"url(#{HATCH_ID})")


def _strip(root: Element) -> None:
    """Remove scripts, styles, comments and the texts that pygal's script would have used."""
    for parent in list(root.iter()):
        for child in list(parent):
            overlay = "overlay" in child.get("class", "")
            if not isinstance(child.tag, str) or child.tag in _UNWANTED or overlay:
                parent.remove(child)
            elif child.tag == "text-alternative":
                child.tag = "title"


def _text(tag: str, text: str, **attributes: str) -> Element:
    element = Element(tag, attributes)
    element.text = text
    return element
