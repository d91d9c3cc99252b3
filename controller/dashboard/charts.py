"""Bar charts as SVG, drawn on the server, without scripts or styles of their own.

Colours and fonts come from the page's stylesheet, so that the charts follow light and dark. What
pygal would show by script is a `<title>` on each bar, which every browser shows by itself.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import pygal
from markupsafe import Markup
from pygal.etree import etree
from pygal.style import Style

# pygal leaves an import hook of a kind that Python no longer calls without a warning; it only serves
# pygal's plugins for maps.
sys.meta_path[:] = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
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
        values: One a bar; 0 draws nothing.
        texts: What each bar's tooltip says.
    """

    kind: str
    label: str
    values: Sequence[float]
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
            min_scale=2,
            max_scale=8 if width > _NARROW else 4,
            margin=4,
            spacing=8,
            value_formatter=lambda value: f"{value:g}",
        )
        max_chars = 24 if width > _NARROW else 14
        chart.x_labels = [_shortened(bar, max_chars) for bar in reversed(self.bars)]
        for series in self.series:
            chart.add(series.label, list(reversed(series.values)))
        chart.add_xml_filter(lambda root: self._as_ours(root, f"{self.id}-{width}"))
        # pygal escapes every text; ElementTree writes the result.
        return Markup(chart.render(is_unicode=True))

    def _as_ours(self, root: Element, element_id: str) -> Element:
        """Rework pygal's tree: names for screen readers, our class names, nothing inline."""
        _strip(root)
        for plot in root.iter("g"):
            index = plot.get("class", "").partition("series serie-")[2].partition(" ")[0]
            if index:
                self._name_bars(plot, self.series[int(index)])
        root.attrib.update(
            {
                "id": element_id,
                "class": "chart",
                "role": "img",
                "aria-labelledby": f"{element_id}-title {element_id}-desc",
            }
        )
        root.insert(0, _text("title", self.title, id=f"{element_id}-title"))
        root.insert(1, _text("desc", self.description, id=f"{element_id}-desc"))
        return root

    def _name_bars(self, plot: Element, series: Series) -> None:
        """Say on each bar what it is; bars without length go."""
        plot.set("class", f"series {series.kind}")
        bars = [group for group in plot.iter("g") if group.get("class") == "bar"]
        named = zip(bars, reversed(self.bars), reversed(series.texts), strict=True)
        for bar, name, text in named:
            rect = bar.find("rect")
            if rect is None or float(rect.get("width", 0)) == 0:
                bar.clear()
                continue
            if series.kind == "idle":
                rect.set("fill", f"url(#{HATCH_ID})")
            bar.append(_text("title", f"{name}: {series.label} {text}"))


def _shortened(name: str, max_chars: int) -> str:
    return name if len(name) <= max_chars else name[: max_chars - 1] + "…"


def _strip(root: Element) -> None:
    """Remove scripts, styles, comments and the texts that pygal's script would have used."""
    for parent in list(root.iter()):
        for child in list(parent):
            is_comment = not isinstance(child.tag, str)
            if is_comment or child.tag in _UNWANTED or "overlay" in child.get("class", ""):
                parent.remove(child)


def _text(tag: str, text: str, **attributes: str) -> Element:
    element = Element(tag, attributes)
    element.text = text
    return element
