"""The page of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_json
from ..finetune.config import usual_settings, without_choice
from ..finetune.folder import RunFolder
from . import cells, figures
from .folder import Metrics, read_metrics
from .masks import Masks, grid_of, read_masks
from .page import Cell, Column, Html, details, figure, notices, page, paragraph, section, table
from .parts import facts, mask_table, pretty, smoothed, thinned
from .units import NOTHING, cell, memory, number, seconds, share


def run_page(folder: Path) -> str:
    """The report of a run, finished or not.

    Raises:
        ConfigError: a file of the run is missing or damaged.
        ModuleNotFoundError: matplotlib is not installed.
    """
    places = RunFolder(folder)
    config = read_json(places.config)
    finished = places.result.exists()
    result = read_json(places.result) if finished else {}
    begun = finished or places.metrics.exists()
    metrics = read_metrics(places.metrics) if begun else Metrics([], [])
    masks = read_masks(places.adapter)
    settings = config.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    return page(
        f"Run {folder.resolve().name}",
        _lead(settings, finished, metrics, folder),
        _settings(settings, config),
        _results(result) if finished else "",
        _curves(metrics),
        _evaluations(metrics),
        _mask(masks, folder, settings.get("dynamic") == "merge"),
    )


def _lead(settings: dict[str, Any], finished: bool, metrics: Metrics, folder: Path) -> Html:
    what = ", ".join(
        f"{key} {settings[key]}"
        for key in ("method", "task", "model", "train")
        if settings.get(key)
    )
    text = paragraph(what or "Its settings are not known.", "quiet")
    if finished:
        return text
    last = metrics.steps[-1]["step"] if metrics.steps else 0
    resumable = RunFolder(folder).checkpoint.is_dir()
    more = "; it holds a checkpoint, from which --resume goes on" if resumable else ""
    return Html(text + notices([f"This run is not finished: {last} steps are recorded{more}."]))


def _results(result: dict[str, Any]) -> Html:
    name = result.get("metric", "metric")
    rows: dict[str, Cell] = {}
    for key, title in (
        ("majority", "the most frequent label, always"),
        ("before", "before training"),
        ("after", "after training"),
    ):
        if key in result:
            rows[f"{name}, {title}"] = cell(result[key], ".4f")
    for key, title in (("eval", "best evaluation"), ("test", "test")):
        if isinstance(found := result.get(key), dict):
            rows |= {f"{title}: {k}": cell(v, ".4f") for k, v in found.items()}
    for key, title, show in _FACTS:
        if key in result:
            rows[title] = show(result[key])
    scoring = result.get("salience")
    if isinstance(scoring, dict) and "peak_memory_bytes" in scoring:
        rows["peak memory of scoring"] = memory(scoring["peak_memory_bytes"])
    if isinstance(versions := result.get("versions"), dict):
        rows["versions"] = Cell(", ".join(f"{k} {v}" for k, v in versions.items()))
    return section(
        "Results",
        facts(rows, "What came out, and what it took; times are without evaluations"),
        details("All of result.json", pretty(result)),
    )


_MOST_METRICS = 20  # of an evaluation, which has four
_FACTS = (
    ("best_step", "step of the best model", cell),
    ("steps", "steps", cell),
    ("trainable_parameters", "trained parameters", cell),
    ("trainable_parameters_without_head", "trained parameters without the head", cell),
    ("head_parameters", "parameters of the head", cell),
    ("density", "trained share of the adapted weights", share),
    ("train_seconds", "training time", seconds),
    ("step_ms_median", "median time of a step, ms", lambda value: cell(value, ",.1f")),
    ("tokens_per_second", "tokens a second", lambda value: cell(value, ",.0f")),
    ("salience_seconds", "scoring time", seconds),
    ("peak_memory_bytes", "peak memory of training", memory),
    ("peak_memory_source", "peak memory as measured by", cell),
    ("device", "device", cell),
    ("processor", "processor", cell),
    ("threads", "threads", cell),
    ("seed", "seed", lambda value: Cell(value)),
    ("commit", "commit", cell),
)


def _curves(metrics: Metrics) -> Html:
    steps, losses = metrics.curve("loss")
    if not steps:
        return section("Training", paragraph("No step is recorded."))
    x, y = thinned(steps, losses)
    names = ["each step" if len(x) == len(steps) else "means of neighbouring steps", "smoothed"]
    lines = [figures.Line(names[0], x, y, faint=len(x) >= 40)]
    if len(x) >= 40:
        lines.append(figures.Line(names[1], x, smoothed(y, len(x) // 30)))
    loss = figures.Panel("training loss", "step", "loss", lines)
    rate = figures.Panel(
        "learning rate", "step", "rate", [figures.Line(names[0], *thinned(*metrics.curve("lr")))]
    )
    drawn = figures.panels(
        "training", "Training loss and learning rate by step", [loss, rate], names
    )
    return section("Training", figure(drawn, f"{len(steps):,} steps are recorded."))


def _evaluations(metrics: Metrics) -> Html:
    found = metrics.evaluations
    if not found:
        return section("Evaluations", paragraph("There is none yet."))
    every = list(dict.fromkeys(name for entry in found for name in entry["eval"]))
    names = every[:_MOST_METRICS]
    left = [f"{len(every) - len(names):,} more metrics are left out."] if every != names else []
    columns = [Column("step", True), Column("epoch", True)]
    columns += [*(Column(name, True) for name in names), Column("best so far")]
    rows = [
        (
            cell(entry["step"]),
            cell(entry.get("epoch"), ".2f"),
            *(cell(entry["eval"].get(name), ".4f") for name in names),
            Cell("yes" if entry.get("best") is True else ""),
        )
        for entry in found
    ]
    drawn = _evaluation_figure(found, names) if len(found) > 1 else Html("")
    listed = table(columns, rows, "Metrics on the held-out data")
    return section("Evaluations", notices(left), drawn, listed)


def _evaluation_figure(found: list[dict[str, Any]], names: list[str]) -> Html:
    parts = []
    for name in names:
        pairs = [(number(entry["step"]), number(entry["eval"].get(name))) for entry in found]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if known:
            x, y = ([pair[i] for pair in known] for i in (0, 1))
            parts.append(
                figures.Panel(name, "step", name, [figures.Line("eval", x, y, points=True)])
            )
    if not parts:
        return Html("")
    drawn = figures.panels("evaluations", "Metrics of the evaluations by step", parts, ["eval"])
    return figure(drawn, "Metrics on the held-out data.")


def _mask(masks: Masks, folder: Path, merged: bool) -> Html:
    if not masks:
        there = RunFolder(folder).adapter.is_dir()
        text = "The run's adapter is no sparse one." if there else "There is no adapter (yet)."
        return section("Where the mask lies", paragraph(text))
    count = sum(pattern.nnz for pattern in masks.values())
    # A mask that merges moved leaves a delta also where it trains no longer.
    what = "entries that hold a delta" if merged else "trained entries"
    text, grid = f"{count:,} {what}, in {len(masks)} layers.", grid_of(masks)
    told = paragraph(f"{text} They are too many to be drawn.")
    if grid.is_drawable:
        title = "Density of the mask by layer and projection"
        told = figure(cells.heat_maps("mask", title, {"": grid}), text)
    return section("Where the mask lies", told, mask_table(masks))


def _settings(settings: dict[str, Any], config: dict[str, Any]) -> Html:
    defaults = _defaults(settings)
    settings = _with_mask(settings, config.get("mask"))
    differing = [n for n in settings if n not in defaults or settings[n] != defaults[n]]
    others = {key: value for key, value in config.items() if key != "settings"}
    title = "Settings that differ from their defaults"
    return section(
        "Settings",
        _setting_table(settings, defaults, differing, title),
        details("All settings", _setting_table(settings, defaults, list(settings), "All settings")),
        details("The rest of config.json", pretty(others)),
    )


def _with_mask(settings: dict[str, Any], mask: object) -> dict[str, Any]:
    """The settings that say something; with a ready mask's, the digest of its entries."""
    told = without_choice(settings)
    if isinstance(mask, dict) and told.get("mask") is not None:
        told["mask"] = f"{told['mask']} (SHA-256 of its entries: {mask.get('sha256')})"
    return told


def _setting_table(
    settings: dict[str, Any], defaults: dict[str, Any], names: list[str], caption: str
) -> Html:
    rows = [
        (
            Cell(name),
            Cell(_shown(settings[name])),
            Cell(_shown(defaults[name]) if name in defaults else "unknown setting"),
        )
        for name in names
    ]
    return table([Column("setting"), Column("value"), Column("default")], rows, caption)


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        return usual_settings(**{k: settings[k] for k in ("task", "method") if k in settings})
    except ConfigError:  # a task or a method that there is not
        return usual_settings()


def _shown(value: object) -> str:
    if value in (None, "", []):
        return NOTHING
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
