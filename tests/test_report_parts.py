"""What the reports compute: statistics over rows, overlap of masks, places in a model."""

import dataclasses

import pytest
import torch
from report_folders import METHODS, row, write_study

from speft_kernels.errors import ConfigError
from speft_kernels.pattern import SparsePattern
from speft_kernels.report import figures, write_report
from speft_kernels.report.aggregate import summarise
from speft_kernels.report.folder import asked_for, diverged_rates
from speft_kernels.report.masks import grid_of, overlap
from speft_kernels.report.page import Cell, Column, table
from speft_kernels.report.study import _by_density, study_page
from speft_kernels.report.study_tables import markdown
from speft_kernels.study.config import Run
from speft_kernels.study.rows import Row, read_rows, write_rows


def test_the_rate_is_chosen_on_the_seeds_that_all_rates_share():
    rows = [
        row(lr=lr, seed=seed, validation=validation, score=score)
        for lr, seed, validation, score in (
            (1e-3, 0, 0.80, 0.70),
            (1e-3, 1, 0.99, 0.99),  # better, but the other rate has no seed 1
            (1e-2, 0, 0.82, 0.71),
            (1e-2, 2, 0.10, 0.75),
        )
    ]
    summary = summarise(rows)
    cell = summary.cells["sst2", "lora"]
    assert cell.rate.lr == 1e-2
    assert (cell.n, cell.mean) == (2, pytest.approx(0.73))
    assert cell.deviation == pytest.approx(0.04 / 2**0.5)  # n - 1 = 1
    first, second = summary.rates["sst2", "lora"]
    assert (first.validation, first.seeds, first.chosen) == (0.80, (0,), False)
    assert (second.validation, second.chosen) == (0.82, True)


def test_rates_without_a_common_seed_and_ties():
    def chosen(*runs, metric="accuracy"):
        summary = summarise([row(lr=lr, seed=s, validation=v, metric=metric) for lr, s, v in runs])
        cell = summary.cells.get(("sst2", "lora"))
        return cell and cell.rate.lr

    nan = float("nan")
    # Seed 1 is what most rates have; the rate without it is out of the choice.
    assert chosen((1e-4, 0, 0.9), (1e-3, 1, 0.7), (1e-2, 1, 0.8)) == 1e-2
    assert chosen((1e-2, 0, 0.8), (1e-3, 0, 0.8)) == 1e-3
    assert chosen((1e-3, 0, 0.3), (1e-2, 0, 0.2), metric="loss") == 1e-2
    assert chosen((1e-3, 0, 0.3), (1e-2, 0, nan)) == 1e-3
    assert chosen((1e-3, 0, nan)) == 1e-3
    assert chosen((1e-3, 0, nan), (1e-2, 0, nan)) is None


def test_a_rate_at_which_the_search_diverged_is_out_of_the_choice():
    rows = [row(lr=lr, seed=s, validation=v) for lr, s, v in ((1e-3, 0, 0.7), (1e-2, 0, 0.8))]
    summary = summarise(rows, {("sst2", "lora", 1e-2)})
    assert summary.cells["sst2", "lora"].rate.lr == 1e-3
    assert [found.validation for found in summary.rates["sst2", "lora"]] == [0.7, None]
    # Neither does a rate win that is the only one there is.
    summary = summarise(rows[1:], {("sst2", "lora", 1e-2)})
    assert summary.cells == {}
    assert "lora on sst2 has no rate" in summary.problems[0]


def test_averages_best_and_markdown():
    rows = [
        row(id=f"{task}{name}{seed}", task=task, name=name, seed=seed, score=score, density=d)
        for task, name, seed, score, d in (
            ("cola", "a|b", 0, 0.50, 0.005),
            ("cola", "a|b", 1, 0.54, 0.005),
            ("cola", "c", 0, 0.51, 0.1),
            ("mrpc", "a|b", 0, 0.70, 0.005),
        )
    ]
    summary = summarise(rows)
    assert summary.averages == {"a|b": pytest.approx((0.52 + 0.70) / 2)}
    assert [key for key, cell in summary.cells.items() if cell.best] == [
        ("cola", "a|b"),
        ("mrpc", "a|b"),
    ]
    assert markdown(summary) == (
        "| method | trained | cola (accuracy, %) | mrpc (accuracy, %) | average | seeds |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| a\\|b | 0.500% | **52.00 ± 2.83** | **70.00** | **61.00** | 1-2 |\n"
        "| c | 10.000% | 51.00 | – | – | 1 |\n"
    )
    assert summarise([*rows, row(task="x", metric="loss")]).averages == {}


def test_one_name_at_several_densities():
    rows = [row(id=str(d), density=d, seed=s) for d in (0.001, 0.01) for s in (0, 1)]
    rows.append(row(id="rounded", density=0.01002, seed=2))
    summary = summarise(rows)
    assert summary.names == ("lora, 0.10%", "lora, 1.00%")
    assert summary.cells["sst2", "lora, 1.00%"].n == 3
    assert summary.problems == ()


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 4)])
def test_overlap_is_that_of_the_sets(block_shape):
    def mask(seed, count):
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randperm(32, generator=generator)[:count].sort().values
        return SparsePattern.from_blocks((16, 16), block_shape, blocks)

    first = {"a": mask(0, 9), "b": mask(1, 3)}
    second = {"a": mask(2, 14), "c": mask(3, 5)}
    sets = [
        {(n, int(i)) for n, p in masks.items() for i in p.mask().flatten().nonzero()}
        for masks in (first, second)
    ]
    found = overlap(first, second)
    assert found.shared == len(sets[0] & sets[1]) > 0
    assert found.jaccard == len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert found.share == len(sets[0] & sets[1]) / len(sets[0])
    assert found.expected == pytest.approx(first["a"].nnz * second["a"].nnz / 256)
    assert overlap(first, first).jaccard == 1
    assert overlap({}, {}).jaccard == 1
    with pytest.raises(ConfigError, match="different models"):
        overlap({"a": mask(0, 1)}, {"a": SparsePattern((4, 4), torch.tensor([1]))})


def test_the_grid_follows_the_names():
    def pattern(count):
        return SparsePattern((4, 4), torch.arange(count))

    names = {
        "bert.encoder.layer.10.attention.self.query": 1,
        "bert.encoder.layer.2.attention.self.query": 2,
        "bert.encoder.layer.2.experts.0.up": 3,
        "bert.encoder.layer.2.experts.1.up": 5,
        "pooler": 4,
    }
    grid = grid_of({name: pattern(count) for name, count in names.items()})
    assert grid.rows == (2, 10, None)
    assert grid.columns == ("attention.self.query", "experts.*.up", "pooler")
    assert grid.density == {
        (10, "attention.self.query"): 1 / 16,
        (2, "attention.self.query"): 2 / 16,
        (2, "experts.*.up"): 8 / 32,
        (None, "pooler"): 4 / 16,
    }
    two = grid_of({"encoder.0.q": pattern(1), "decoder.0.q": pattern(2), "3": pattern(1)})
    assert two.columns == ("encoder: q", "decoder: q", ": itself")


NAME = "<img src=x onerror=alert(1)> \x07"


def test_a_cell_escapes_its_text():
    made = table([Column(NAME), Column("n", True)], [(Cell(NAME), Cell(1, 10**400))], NAME)
    assert "<img" not in made
    assert "\x07" not in made
    assert 'data-value="Infinity"' in made


def test_rows_of_an_earlier_grid_are_set_aside():
    tasks = {"sst2": {"train": "a.tsv", "epochs": 3}, "cola": {"train": "b.tsv", "epochs": 3}}
    methods = {"lora": {"method": "lora"}, "full": {"method": "full"}}
    study = {"tasks": tasks, "methods": methods}
    study["seeds"] = {"lora": [0, 1], "full": [0]}
    study["lr"] = {name: [1e-3, 1e-2] for name in methods}

    def of(task, name, lr=1e-2, seed=0, **changed):
        settings = {**tasks[task], **methods[name], "lr": lr, "seed": seed, **changed}
        return row(
            id=Run(task, name, lr, seed, settings).id, task=task, name=name, lr=lr, seed=seed
        )

    rows = [
        of("cola", "full"),
        of("cola", "lora"),
        of("sst2", "full"),
        of("sst2", "lora", epochs=5),
        of("sst2", "lora", lr=0.1),
        of("sst2", "full", seed=1),
        of("sst2", "lora"),
    ]
    kept, others = asked_for(rows, study)
    assert [(r.task, r.name) for r in kept] == [
        ("sst2", "lora"),
        ("sst2", "full"),
        ("cola", "lora"),
        ("cola", "full"),
    ]
    assert others == [rows[3].id, rows[4].id, rows[5].id]
    for strange in ({}, {"tasks": 3}, {**study, "lr": None}, {**study, "seeds": [0, 1]}):
        assert len(asked_for(rows, strange)[0]) == len(rows)
        assert diverged_rates(rows, strange, {r.id for r in rows}) == set()
    foreign = [row(id="x", name="other"), row(id="y", task="cola"), row(id="z")]
    assert [r.id for r in asked_for(foreign, study)[0]] == ["z", "x", "y"]


def test_methods_that_differ_in_their_budget_alone_are_one_line(monkeypatch):
    def drawn(*methods):
        caught = []
        monkeypatch.setattr(
            figures, "panels", lambda key, title, parts, names: caught.append((parts, names)) or ""
        )
        rows = [
            row(id=name, name=name, method=method, salience=salience, density=density)
            for name, method, salience, density in methods
        ]
        _by_density(summarise(rows))
        ((panel,), names) = caught[0]
        return {line.name: list(line.x) for line in panel.lines}, [name for name in names if name]

    ranks = [(f"lora-{rank}", "lora", "", 0.01 * rank) for rank in (1, 4, 2)]
    others = [("pissa-1", "pissa", "", 0.01), ("full", "full", "", 1.0)]
    lines, names = drawn(*ranks, *others)
    assert lines == {"lora": [0.01, 0.02, 0.04], "pissa-1": [0.01], "full": [1.0]}
    assert names == ["lora", "pissa-1", "full"]  # a line's look is that of its first method
    # Two of one budget differ in something else: their points are not joined.
    sparse = [(f"snip-{share}", "speft", "snip", share) for share in (0.001, 0.01)]
    lines, _ = drawn(*ranks, ("lora-long", "lora", "", 0.02), *sparse)
    assert set(lines) == {"lora-1", "lora-2", "lora-4", "lora-long", "speft snip"}
    assert lines["speft snip"] == [0.001, 0.01]


SOME = {name: METHODS[name] for name in ("lora", "magnitude")}


@pytest.mark.parametrize("value", ["nan", "inf", "1e308", "0"])
def test_no_number_breaks_the_page(tmp_path, value):
    """A study whose numbers are all odd, in every other row; whole ones are as long as they may."""
    write_study(tmp_path / "study", tasks=("sst2",), methods=SOME, runs=False)
    rows = read_rows(tmp_path / "study" / "runs.csv")
    whole = 0 if value == "0" else 10**400
    odd = {
        field.name: float(value) if "float" in field.type else whole
        for field in dataclasses.fields(Row)
        if field.type in ("float", "int", "int | None", "float | None")
    }
    rows = [dataclasses.replace(r, **odd) if i % 2 else r for i, r in enumerate(rows)]
    write_rows(tmp_path / "study" / "runs.csv", rows)
    page = write_report(tmp_path / "study").read_text(encoding="utf-8")
    assert "All runs" in page
    write_rows(tmp_path / "study" / "runs.csv", rows[1::2])
    write_report(tmp_path / "study")


def test_a_time_of_next_to_nothing_does_not_break_the_page(tmp_path):
    rows = [row(salience_seconds=1.0, train_seconds=5e-324)]
    (tmp_path / "study.json").write_text("{}")
    write_rows(tmp_path / "runs.csv", rows)
    assert "Scoring time" in study_page(tmp_path)
