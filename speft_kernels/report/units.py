"""Numbers of unknown origin, and how they are shown."""

from __future__ import annotations

from .page import Cell

NOTHING = "–"
_LARGEST = 1e100


def number(value: object) -> float | None:
    """`value` as a finite number, None for anything else, and for what no axis could hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _LARGEST else None


def cell(value: object, form: str = "") -> Cell:
    """A cell that shows the number `value` in a format, and sorts by it."""
    found = number(value)
    if found is None:
        return Cell(NOTHING if value in (None, "") else value)
    return Cell(format(found, form) if form else f"{value:,}", found)


def share(value: object) -> Cell:
    return cell(value, ".3%")


def seconds(value: object) -> Cell:
    """Seconds as minutes or hours where they are many."""
    found = number(value)
    if found is None:
        return cell(value)
    if found < 100:
        return Cell(f"{found:.1f} s", found)
    minutes = round(found / 60)
    text = f"{found / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
    return Cell(text, found)


def memory(value: object) -> Cell:
    found = number(value)
    if found is None:
        return cell(value)
    small = found < 2**30
    return Cell(f"{found / 2**20:.0f} MiB" if small else f"{found / 2**30:.2f} GiB", found)
