"""`speft bench`: what it prints and writes, and what it refuses before it measures."""

import importlib.util
from functools import partial

import pytest
import torch

from speft_kernels.bench.cases import sampled_grad
from speft_kernels.bench.records import read_records
from speft_kernels.cli import main
from speft_kernels.pattern import SparsePattern


@pytest.fixture
def tiny(monkeypatch):
    """`speft bench` with one tiny case."""
    pattern = SparsePattern.from_indices((16, 12), torch.tensor([0, 30, 31]))
    case = partial(sampled_grad.setup, "tiny", [pattern], kept=1e6, tokens=5)
    monkeypatch.setattr(sampled_grad, "CASES", {"tiny": case})
    monkeypatch.setattr(sampled_grad, "QUICK", ("tiny",))


def test_the_command_prints_and_writes_what_it_measured(tiny, tmp_path, capsys):
    output, figure = tmp_path / "bench.csv", tmp_path / "bench.png"
    flags = ["--quick", "--rounds", "1", "--threads", "1", "--output", output, "--plot", figure]
    assert main(["bench", "sampled_grad", *map(str, flags)]) == 0
    printed = capsys.readouterr().out
    assert "sampled_grad: tiny" in printed
    assert "x kept / dense dW, gather: " in printed
    assert "goal at most 1e+06: met" in printed
    assert "goals: 1 met, 0 missed" in printed
    rows = read_records(output)
    sides = ["x whole", "x kept", "keep, x kept", "dense dW, gather"]
    assert [row.side for row in rows] == sides
    assert {(row.threads, row.rounds, row.case) for row in rows} == {(1, 1, "tiny")}
    assert all(row.median_ms > 0 and row.light_ms > 0 for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sampled_grat"], "unknown operation 'sampled_grat'. Did you mean 'sampled_grad'?"),
        *(
            (["--rounds", value], f"--rounds: '{value[:50]}")
            for value in ("0", "-1", "1_0", str(10**30), "9" * 5000)
        ),
        (["--threads", "-1"], "--threads: '-1' is not a whole number from 1"),
        (["--threads", str(10**30)], f"--threads: '{10**30}' is not a whole number from 1"),
        (["--threads", "99999"], "99999 is more than this machine's"),
        (["--output", "{}/none/bench.csv"], "none does not exist"),
        (["--output", "{}/other.csv"], "no table of benchmark results"),
        (["--output", "{}"], "is a folder or a device"),
        (["--output", "{}/" + "x" * 250], "cannot be written: File name too long"),
        (["--plot", "{}"], "is a folder or a device"),
        (["--plot", ""], "is a folder or a device"),
        (["--plot", "{}/none/bench.png"], "none does not exist"),
        (["--plot", "{}/bench.badsuffix"], "must end in one of .png, .svg, .pdf, .jpg"),
        (["--plot", "{}/bench"], "must end in one of .png"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, flags, message
):
    (tmp_path / "other.csv").write_text("something else\n")
    monkeypatch.setattr("speft_kernels.bench.harness.measure", None)  # calling it would fail
    try:
        code = main(["bench", *(flag.format(tmp_path) for flag in flags)])
    except SystemExit as stopped:  # argparse's own way
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err) < 1000
    assert printed.out == ""
    assert (tmp_path / "other.csv").read_text() == "something else\n"


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".jpg"])
def test_every_format_of_the_figure_is_written(tiny, tmp_path, ending):
    figure = tmp_path / f"bench{ending}"
    assert main(["bench", "sampled_grad", "--quick", "--rounds", "1", "--plot", str(figure)]) == 0
    assert figure.stat().st_size > 1000


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--plot", str(tmp_path / "figure.png")]) == 2
    assert "pip install 'speft-kernels[report]'" in capsys.readouterr().err
