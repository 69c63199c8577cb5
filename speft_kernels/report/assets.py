"""The style and the script of every page: constants, without any data in them."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --text: #1d2430;
  --quiet: #566072;
  --ground: #fbfbfc;
  --panel: #ffffff;
  --line: #d8dde5;
  --mark: #e3f2e8;
  --warn: #9a5b00;
  --link: #1d5fb4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e3e7ee;
    --quiet: #a3adbd;
    --ground: #14171c;
    --panel: #1b1f26;
    --line: #363d49;
    --mark: #1f3d2c;
    --warn: #e5b25d;
    --link: #82b4f5;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 68rem;
  margin: 0 auto;
  padding: 1.5rem 1rem 4rem;
  background: var(--ground);
  color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { margin: 0 0 0.5rem; font-size: 1.7rem; line-height: 1.25; }
h2 {
  margin: 2.5rem 0 0.75rem;
  padding-bottom: 0.25rem;
  border-bottom: 1px solid var(--line);
  font-size: 1.25rem;
}
p { margin: 0.5rem 0; max-width: 50rem; }
.quiet, figcaption { color: var(--quiet); }
.notices {
  margin: 0.75rem 0;
  padding: 0.5rem 0.75rem 0.5rem 2rem;
  border-left: 4px solid var(--warn);
  background: var(--panel);
}
figure {
  margin: 1rem 0;
  padding: 0.75rem;
  border: 1px solid var(--line);
  background: var(--panel);
  overflow-x: auto;
}
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: 0.5rem; font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
.scroll:focus-visible, pre:focus-visible, button:focus-visible, summary:focus-visible {
  outline: 2px solid var(--link);
  outline-offset: 1px;
}
table { border-collapse: collapse; font-size: 0.9rem; background: var(--panel); }
caption { text-align: left; color: var(--quiet); padding: 0.25rem 0; }
th, td {
  padding: 0.3rem 0.6rem;
  border: 1px solid var(--line);
  text-align: left;
  vertical-align: top;
  overflow-wrap: normal;
}
tbody th { font-weight: 600; }
tbody .text { white-space: nowrap; }
tbody .long { min-width: 18rem; white-space: normal; overflow-wrap: anywhere; }
thead th { background: var(--ground); vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.marked { background: var(--mark); }
th button {
  all: unset;
  cursor: pointer;
  font-weight: 600;
}
th button::after { content: " ↕"; color: var(--quiet); }
th[aria-sort="ascending"] button::after { content: " ↑"; color: inherit; }
th[aria-sort="descending"] button::after { content: " ↓"; color: inherit; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
details { margin: 0.75rem 0; }
td details { margin: 0; }
summary { cursor: pointer; color: var(--link); }
pre {
  overflow-x: auto;
  max-height: 32rem;
  padding: 0.75rem;
  border: 1px solid var(--line);
  background: var(--panel);
  font-size: 0.85rem;
  overflow-wrap: normal;
}
@media print {
  details > * { display: block; }
  .scroll { overflow: visible; }
}
"""

SCRIPT = """
"use strict";
// Sorts a table by the column whose header is pressed: ascending, then descending. Empty cells stay
// last. Without this script the tables read the same, in the order they were written.
const words = new Intl.Collator("en", { numeric: true });

function key(row, column, numeric) {
  const cell = row.cells[column];
  if (!numeric) return cell.textContent.trim() || null;
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function compare(a, b, numeric) {
  return numeric ? a - b : words.compare(a, b);
}

function sort(header) {
  const table = header.closest("table");
  const body = table.tBodies[0];
  const numeric = header.dataset.sort === "number";
  const descending = header.getAttribute("aria-sort") === "ascending";
  const keyed = Array.from(body.rows, (row) => [key(row, header.cellIndex, numeric), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return descending ? compare(b, a, numeric) : compare(a, b, numeric);
  });
  for (const other of table.tHead.rows[0].cells) {
    if (other.dataset.sort) other.setAttribute("aria-sort", "none");
  }
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...keyed.map(([, row]) => row));
}

for (const header of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  button.addEventListener("click", () => sort(header));
  header.append(button);
  header.setAttribute("aria-sort", "none");
}
"""
