"""From a matplotlib figure to SVG inside a page: the page's colours, unique ids, fixed bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

from ..errors import plain
from .page import Html, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn in this colour, a thing takes the colour of the page's text, in the light and in the dark.
TEXT = "#010203"
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_SETTINGS: dict[str, Any] = {
    # Text stays text: it can be searched and read aloud. matplotlib measures it in DejaVu Sans,
    # which is wider than most, so that another font of the reader's fits too.
    "svg.fonttype": "none",
    "svg.hashsalt": "speft",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT
    ),
    "grid.color": TEXT,
}


@contextmanager
def _style() -> Iterator[None]:
    """The defaults of matplotlib and ours, whatever the reader's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, _SETTINGS))
        yield


def draw(key: str, title: str, size: tuple[float, float], fill: Callable[[Figure], object]) -> Html:
    """The figure that `fill` draws, as inline SVG; the same data give the same bytes.

    Args:
        key: starts every id in the figure; unique in the page.
        title: for those who cannot see the figure.
        size: width and height in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    buffer = io.BytesIO()
    with _style(), warnings.catch_warnings():
        # The reader's font draws what DejaVu Sans lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
        figure = Figure(figsize=size, dpi=72, layout=layout)
        canvas = FigureCanvasSVG(figure)
        fill(figure)
        # Laid out once, drawn once: savefig would draw a second time, for the layout.
        layout.execute(figure)
        figure.set_layout_engine("none")
        canvas.print_svg(buffer, metadata={"Date": None})
    return _inline(buffer.getvalue(), key, title)


def _inline(svg: bytes, key: str, title: str) -> Html:
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, key)
    # One point of matplotlib's as one pixel and a quarter: text of 10 points is 12.5 pixels high.
    # On a narrow screen a figure shrinks until its text is 9 pixels high, and then scrolls.
    width = 1.25 * float(root.attrib["width"].removesuffix("pt"))
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {
            "id": key,
            "class": "plot",
            "viewBox": view,
            "width": f"{width:.0f}",
            "role": "img",
            "aria-labelledby": f"{key}-title",
            "style": f"min-width: {0.75 * width:.0f}px; stroke-linejoin: round",
        }
    )
    heading = ElementTree.Element("title", {"id": f"{key}-title"})
    heading.text = plain(title)
    root.insert(0, heading)
    return Html(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True).strip())


def _adapt(element: ElementTree.Element, key: str) -> None:
    """Make one element fit for a page: no namespaces, ids of its own, the text's colour."""
    element.tag = element.tag.removeprefix(_SVG)
    attributes = dict(element.attrib)
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            value = f"{key}-{value}"
        elif name in ("href", f"{_XLINK}href"):
            name, value = "href", value.replace("#", f"#{key}-", 1)
        elif name in ("style", "clip-path", "fill", "stroke"):
            value = value.replace("url(#", f"url(#{key}-").replace(TEXT, "currentColor")
            value = re.sub(r"'DejaVu Sans'[^;]*", "inherit", value) if name == "style" else value
        element.set(name, value)


def label(value: object) -> str:
    """A name of unknown origin for a figure: of a long one its first 15 and its last 14 letters."""
    text = short(value, 10**6)
    return text if len(text) <= 30 else f"{text[:15]}…{text[-14:]}"
