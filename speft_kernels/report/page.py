"""A self-contained HTML page: its shell, style and tables.

Everything that comes from a folder passes through `escape`, in text and in attributes alike. The
script is a constant without any data in it, and the page's policy runs no other and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import plain
from .assets import SCRIPT, STYLE


class Html(str):
    """Text that is HTML already, made by the functions here; any other text gets escaped."""

    __slots__ = ()


class Cell(NamedTuple):
    """What a table shows in one place; `order` is the number it is sorted by, if any."""

    text: object
    order: float | None = None
    marked: bool = False


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = False


def short(value: object, length: int = 32) -> str:
    """`plain(value)` on one line, at most `length` characters long."""
    text = " ".join(plain(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def escape(value: object) -> Html:
    """`value` for the text or a quoted attribute of a page."""
    return value if isinstance(value, Html) else Html(html.escape(plain(value), quote=True))


def join(*parts: object) -> Html:
    return Html("\n".join(escape(part) for part in parts if part != ""))


def paragraph(text: object, kind: str = "") -> Html:
    return Html(
        f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"
    )


def notices(lines: Sequence[object]) -> Html:
    """What the reader must know about missing or odd data; nothing for no lines."""
    if not lines:
        return Html("")
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return Html(f'<ul class="notices">\n{items}\n</ul>')


def section(title: object, *parts: object) -> Html:
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n{join(*parts)}\n</section>")


def details(summary: object, *parts: object) -> Html:
    return Html(f"<details>\n<summary>{escape(summary)}</summary>\n{join(*parts)}\n</details>")


def preformatted(text: object) -> Html:
    return Html(f'<pre tabindex="0">{escape(text)}</pre>')


def code(text: object) -> Html:
    return Html(f"<code>{escape(text)}</code>")


def figure(svg: Html, caption: object) -> Html:
    return Html(f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>")


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    caption: str,
    *,
    sortable: bool = True,
) -> Html:
    """A table whose first column heads its rows; `caption` says what it holds.

    A wide table scrolls in its own box, which the keyboard reaches.
    """
    heads = "".join(_head(column, sortable and len(rows) > 1) for column in columns)
    body = "\n".join(
        f"<tr>{''.join(_cell(c, columns[i], i == 0) for i, c in enumerate(row))}</tr>"
        for row in rows
    )
    return Html(
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _head(column: Column, sortable: bool) -> str:
    kind = "number" if column.numeric else "text"
    sort = f' data-sort="{kind}"' if sortable else ""
    return f'<th scope="col" class="{kind}"{sort}>{escape(column.title)}</th>'


def _cell(cell: Cell, column: Column, first: bool) -> str:
    value = "" if cell.order is None else _order(cell.order)
    kind = ("number" if column.numeric else "text") + (" marked" if cell.marked else "")
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    text = escape(cell.text)
    if len(text) > 36 and not column.numeric:
        kind += " long"
        if not isinstance(cell.text, Html):  # names of layers and files break between their parts
            text = Html(re.sub(r"[./](?=[^\W\d])", r"\g<0><wbr>", text))
    if cell.marked:
        text = Html(f"<strong>{text}</strong>")
    return f'<{tag}{scope} class="{kind}"{value}>{text}</{tag}>'


def _order(order: float) -> str:
    try:
        value = float(order)
    except OverflowError:
        value = math.inf if order > 0 else -math.inf
    return "" if math.isnan(value) else f' data-value="{value!r}"'.replace("inf", "Infinity")


def page(title: object, lead: object, *sections: object) -> str:
    """The whole document."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{escape(lead)}
</header>
<main>
{join(*sections)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
