import dataclasses
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from report_folders import METHODS, write_study
from tiny_runs import make_place

from speft_kernels.adapter import read_adapter
from speft_kernels.cli import main
from speft_kernels.errors import ConfigError
from speft_kernels.pattern import SparsePattern
from speft_kernels.report import write_report
from speft_kernels.report.page import plain
from speft_kernels.study.rows import read_rows, write_rows

HOSTILE = "</script><img src=x onerror=alert(1)>\" onload='alert(2)' $\\frac{1}$ <!-- \u202e\x07"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("trained"), 48, 16)
    given = {
        "--model": folder / "model",
        "--train": folder / "train.tsv",
        "--eval": folder / "eval.tsv",
        "--output": folder / "run",
        **{"--batch-size": 8, "--scoring-examples": 16, "--scoring-batches": 2},
        **{"--pooling": "mean", "--density": 0.05, "--lr": 2e-2, "--epochs": 2},
    }
    assert main(["finetune", *(str(part) for pair in given.items() for part in pair)]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("made") / "study", tasks=("mrpc", "sst2"))


@pytest.fixture
def study(made, tmp_path):
    return shutil.copytree(made, tmp_path / "study")


class Page(HTMLParser):
    """Elements, their attributes, and the rows of each table as text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.tables, self.texts = [], [], [], []
        self._stack = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._stack.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append(data)
        if any(tag in ("td", "th") for tag in self._stack) and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def table_with(self, header):
        return next(rows for rows in self.tables if rows and header in rows[0])


def report(folder):
    return Page(write_report(folder))


def check_self_contained(page):
    """No address but the page's own parts, no code but the page's own script."""
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
            assert value == "data:," or value[1:] in ids, (tag, name, value)
        if name == "aria-labelledby":
            assert value in ids
        for target in re.findall(r"url\((.*?)\)", value or ""):
            assert target[1:] in ids, (tag, name, value)
    assert page.tags.count("script") == 1
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.tags)


def test_a_finished_run(trained, capsys):
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out == f"{trained / 'report.html'}\n"
    page = Page(trained / "report.html")
    check_self_contained(page)
    result = json.loads((trained / "result.json").read_text())
    facts = dict(map(tuple, page.table_with("what")[1:]))
    assert facts["accuracy, before training"] == f"{result['before']:.4f}"
    assert facts["accuracy, after training"] == f"{result['after']:.4f}"
    assert facts["accuracy, the most frequent label, always"] == "0.5000"
    assert facts["trained parameters"] == f"{result['trainable_parameters']:,}"
    assert f"torch {version('torch')}" in facts["versions"]
    differing = dict(r[:2] for r in page.table_with("setting")[1:])
    assert differing["lr"] == "0.02"
    assert not {"scheduler", "salience", "selection", "head_warmup_steps"} & set(differing)
    layers = {r[0]: r for r in page.table_with("layer")[1:]}
    for name, layer in read_adapter(trained / "adapter").layers.items():
        used = (layer.pattern.used_rows.numel(), layer.pattern.used_cols.numel())
        assert layers[name][3] == str(layer.pattern.nnz)
        assert (layers[name][5], layers[name][7]) == tuple(map(str, used))
    assert len(page.table_with("step")) == 1 + 2
    assert page.tags.count("svg") == 3  # loss and rate, evaluations, the mask
    for label in ("attention.self.query", "learning rate", "training loss"):
        assert label in page.texts


def test_the_same_data_give_the_same_bytes(trained, tmp_path):
    import matplotlib

    methods = {name: METHODS[name] for name in ("magnitude", "gradient")}
    study = write_study(tmp_path / "study", tasks=("sst2",), methods=methods, layers=1)
    for folder in (study, trained):
        first = write_report(folder, tmp_path / "first.html").read_bytes()
        with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "text.usetex": True}):
            assert write_report(folder, tmp_path / "second.html").read_bytes() == first


def test_an_unfinished_run(run):
    (run / "result.json").unlink()
    (run / "checkpoint").mkdir()
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 13, "los')
    page = report(run)
    assert "not finished: 12 steps are recorded; it holds a checkpoint" in page.text
    assert "Results" not in page.text
    assert page.tags.count("svg") == 3

    for name in ("metrics.jsonl", "adapter"):
        path = run / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    page = report(run)
    assert "0 steps are recorded" in page.text
    assert "There is no adapter (yet)" in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "no such file"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[" * 100_000, "nested too deeply"),
        ("config.json", b"\xff{}", "not UTF-8"),
        ("result.json", b"[1]", "must hold an object"),
        ("result.json", b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        ("metrics.jsonl", None, "no such file"),
        ("metrics.jsonl", b'{"step": 1}\n{"step\n{"step": 2}\n', "line 2: damaged"),
        ("metrics.jsonl", b'{"step": 1}\n7\n', "line 2: damaged: not an object"),
        ("metrics.jsonl", b'{"loss": 1}\n', "line 1: damaged: it has no step"),
        ("metrics.jsonl", b'{"step": 1, "eval": 3}\n', "line 1: damaged: eval"),
        ("adapter/adapter.safetensors", b"nothing", "checksum"),
        ("adapter/adapter_config.json", b"{}", "adapter_config.json"),
    ],
)
def test_a_damaged_run(run, capsys, name, content, reason):
    (run / "report.html").write_text("the old one")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert str(run / Path(name).parts[0]) in error
    assert reason in error
    assert content is not None or ": damaged:" not in error
    assert error.count("\n") == 1
    assert (run / "report.html").read_text() == "the old one"


def test_values_of_other_kinds_do_no_harm(run):
    """Valid JSON that no run would write."""
    (run / "config.json").write_text('{"settings": [1], "x": "\\ud800\\u0000"}')
    odd = {"before": "x", "after": None, "test": 3, "versions": [], "salience": 1, "metric": {}}
    (run / "result.json").write_text(json.dumps({**odd, "steps": 10**400, "density": [1]}))
    lines = [{"step": 10**400}, {"step": 1, "loss": 1e400, "lr": True}, {"step": 2, "eval": {}}]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines[1:]) + '{"step": 3, "eval": {"a": "b"}}\n'
    )
    check_self_contained(report(run))
    (run / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ConfigError, match="no step"):
        report(run)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, float("nan")])
def test_no_number_breaks_the_page(run, value):
    entries = [{"step": n, "loss": value * (-1) ** n, "lr": value} for n in range(50)]
    entries += [{"step": n, "eval": {"a": value, "b": n}} for n in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    recorded = "50 steps are recorded" if value == 5e-324 else "No step is recorded"
    assert recorded in report(run).text


def test_no_page_is_endless(run, monkeypatch):
    """Layers whose names are all different span a square, metrics of their own a panel each."""
    one = SparsePattern((4, 4), torch.tensor([1]))
    masks = {f"layer.{n}.part{n}": one for n in range(150)}
    monkeypatch.setattr("speft_kernels.report.run.read_masks", lambda folder: masks)
    monkeypatch.setattr("speft_kernels.report.folder.read_masks", lambda folder: masks)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "eval": {f"m{n}": 0.5}}) + "\n" for n in range(200))
    )
    page = report(run)
    assert "150 trained entries, in 150 layers. They are too many to be drawn" in page.text
    assert len(page.table_with("used columns")) == 151
    assert "180 more metrics are left out" in page.text
    assert page.tags.count("svg") == 1
    study = write_study(run / "study", tasks=("sst2",))
    assert "The masks have too many layers to be drawn: sst2, seed 0" in report(study).text


def test_what_cannot_be_reported(tmp_path, trained, capsys, monkeypatch):
    for folder, reason in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path, "neither a run .* nor a study"),
    ):
        with pytest.raises(ConfigError, match=reason):
            write_report(folder)
    os.mkfifo(tmp_path / "pipe")  # as a device is, not to be replaced by a file
    for output in (tmp_path, tmp_path / "absent" / "page.html", tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="choose another --output"):
            write_report(trained, output)
        assert main(["report", str(trained), "--output", str(output)]) == 2
        assert f"--output {output}" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(trained), "--output", str(tmp_path / "page.html")]) == 2
    assert "pip install 'speft-kernels[report]'" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_study(study, capsys):
    assert main(["report", str(study)]) == 0
    assert capsys.readouterr().err == ""
    page = Page(study / "report.html")
    check_self_contained(page)
    assert "36 runs, 2 tasks, 6 methods, 2 seeds" in page.text
    scores = {r[0]: r for r in page.table_with("average")[1:]}
    assert list(scores) == list(METHODS)
    # 0.6 + 0.03 * 3 + 0.01 * seed + lr - 0.02 over the seeds 0 and 1; the next task 5 points more.
    assert scores["gradient"][1:] == ["5.000%", "68.50 ± 0.71", "73.50 ± 0.71", "71.00", "2"]
    rates = page.table_with("0.001")
    assert rates[1] == ["mrpc", "head", "60.10", "61.00", "0"]
    assert len(rates) == 1 + 2 * len(METHODS)
    assert page.tags.count("svg") == 2 + 2 * 2 + 1 + 1
    assert len(page.table_with("settings")) == 1 + 36
    assert page.table_with("versions")[1][-2:] == ["python 3.11.2, torch 2.13.0", "36"]
    masks = [
        read_adapter(study / "runs" / f"0-{method}-0.01-0" / "adapter").layers for method in (2, 3)
    ]
    sets = [
        {(n, int(i)) for n, layer in mask.items() for i in layer.pattern.entry_indices}
        for mask in masks
    ]
    pair = page.table_with("Jaccard")[1]
    shared = len(sets[0] & sets[1])
    assert pair[:5] == ["magnitude", "gradient", *map(str, (len(sets[0]), len(sets[1]), shared))]
    assert pair[5] == f"{shared / len(sets[0] | sets[1]):.3%}"


def test_a_mask_that_merges_moved_is_drawn_and_not_compared(study, trained, tmp_path):
    rows = read_rows(study / "runs.csv")
    moved = {"salience": "snip", "dynamic": "merge", "mask_seconds": 16.5}
    changed = [dataclasses.replace(r, **moved) if r.name == "gradient" else r for r in rows]
    write_rows(study / "runs.csv", changed)
    page = report(study)
    assert "Jaccard" not in [text for table in page.tables for row in table for text in row]
    assert "One that dynamic merge moved is not compared" in page.text
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert "masks-0" in ids
    assert "overlap-0-0" not in ids
    costs = {r[0]: r for r in page.table_with("scoring")[1:]}
    assert (costs["gradient"][3], costs["magnitude"][3]) == ("19.5 s", "3.0 s")
    run = shutil.copytree(trained, tmp_path / "moved")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["dynamic"] = "merge"
    (run / "config.json").write_text(json.dumps(config))
    assert "entries that hold a delta" in report(run).text
    assert "entries that hold a delta" not in report(trained).text


def test_hostile_names(tmp_path):
    methods = {
        HOSTILE: METHODS["lora"],
        HOSTILE + "2": {**METHODS["magnitude"], HOSTILE: HOSTILE},
        "gradient": METHODS["gradient"],  # a pair of masks: the task's name is in an attribute
    }
    write_study(tmp_path / "s", tasks=(HOSTILE,), methods=methods, name=HOSTILE, layers=1)
    rows = read_rows(tmp_path / "s" / "runs.csv")
    fields = ("metric", "device", "processor", "commit", "versions", "settings", "dynamic")
    hostile = [dataclasses.replace(r, **dict.fromkeys(fields, HOSTILE)) for r in rows]
    write_rows(tmp_path / "s" / "runs.csv", hostile)
    page = report(tmp_path / "s")
    check_self_contained(page)
    assert "\u202e" not in page.html
    assert "\x07" not in page.html
    assert plain(HOSTILE) in page.texts
    assert page.table_with("average" if "average" in page.texts else "seeds")[1][0] == plain(
        HOSTILE
    )


def test_a_hostile_run(run):
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {HOSTILE: HOSTILE, "model": HOSTILE}
    (run / "config.json").write_text(json.dumps(config))
    result = json.loads((run / "result.json").read_text())
    result |= {"metric": HOSTILE, "versions": {HOSTILE: HOSTILE}, "test": {HOSTILE: HOSTILE}}
    (run / "result.json").write_text(json.dumps(result))
    evaluation = {"step": 12, "eval": {HOSTILE: 0.5}}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f"{json.dumps(evaluation)}\n" * 2)
    check_self_contained(report(run))


def test_damaged_runs_of_a_study_are_named(study):
    runs = study / "runs"
    (runs / "0-2-0.01-0" / "adapter" / "adapter.safetensors").write_bytes(b"nothing")
    (runs / "1-1-0.01-1" / "metrics.jsonl").write_text("nothing\n{}\n")
    shutil.rmtree(runs / "1-0-0.01-0")
    (runs / "not-finished").mkdir()
    (runs / "diverged").mkdir()
    (study / "failures.json").write_text(
        '{"diverged": "the loss is inf", "1-1-0.01-1": "not at the second try"}'
    )
    rows = read_rows(study / "runs.csv")
    nan = float("nan")
    changed = {
        "0-1-0.01-1": {"score": nan},
        "0-5-0.001-0": {"validation": nan},
        "1-3-0.01-0": {"metric": "f1"},
        "1-4-0.01-0": {"id": "../../outside"},
        "1-5-0.01-1": {"seed": 0},
        "1-2-0.01-0": {"id": "x" * 300},
    }
    write_rows(study / "runs.csv", [dataclasses.replace(r, **changed.get(r.id, {})) for r in rows])
    page = report(study)
    for line in (
        "run 0-2-0.01-0 could not be read: .*checksum",
        r"run 1-1-0.01-1 could not be read: .*metrics.jsonl, line 1",
        "run 0-1-0.01-1 is left out of the statistics: its score is nan",
        "run 1-3-0.01-0 is left out of the statistics: its metric is f1, that of its task accuracy",
        "run x+ could not be read: File name too long",
        r"run ../../outside could not be read: .* is no name of a run's folder",
        "run 1-5-0.01-1 repeats run 1-5-0.01-0",
        "The loss curves of these runs are left out, .*: 1-0-0.01-0",
        "run diverged failed: the loss is inf",
        "3 with a folder and no row in runs.csv yet: .*not-finished",
    ):
        assert re.search(line, page.text), line
    assert "second try" not in page.text
    assert len(page.table_with("settings")) == 1 + len(rows)  # nothing is lost


def test_a_study_of_rows_alone(tmp_path):
    folder = write_study(tmp_path / "study", tasks=("sst2",), runs=False)
    page = report(folder)
    assert "so nothing is said of the masks" in page.text
    assert "so there are no loss curves" in page.text
    assert page.tags.count("svg") == 3

    (folder / "runs.csv").unlink()
    assert "No run has finished" in report(folder).text
    (folder / "runs.csv").write_text("id,task\nx,y\n")
    with pytest.raises(ConfigError, match=r"runs.csv: no column"):
        write_report(folder)
    (folder / "study.json").unlink()
    with pytest.raises(ConfigError, match=r"study.json: no such file"):
        write_report(folder)
