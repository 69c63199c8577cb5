"""What `scripts/gpu_check.sh` does about a machine that lacks something: a compiler that fails, a
plugin, time.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speft_kernels.bench.gpu import check, device, install, journal, record, stages
from speft_kernels.bench.gpu.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
H200 = install.Machine("2.11.0", "H200", (9, 0), 139.0, 16, False, True)

COMPILERS_WORDS = """
ERROR: Command errored out
  [1/9] compile csrc/cuda/block_grad.cu
  csrc/cuda/block_grad.cu(12): error: identifier "wgmma" is undefined
  FAILED: [code=2] _cuda/cuda/block_grad.cu.o
"""


@pytest.fixture
def checking(tmp_path):
    return check.Check(tmp_path, H200, False, float("inf"))


@pytest.fixture
def pip(monkeypatch):
    """Commands of pip, answered by a function of their environment; nothing is installed."""
    monkeypatch.setattr(install, "_environment", lambda own: False)
    monkeypatch.setattr(install, "_remove_older_kernels", lambda: None)
    monkeypatch.setattr(install, "import_error", lambda python, with_cuda=False, more=None: "")
    asked, commands = [], []

    def answering(answer):
        def run(command, more):
            asked.append(more)
            commands.append(command)
            return answer(more)

        return run

    answering.commands = commands
    return asked, answering


def test_a_file_that_nvcc_refuses_costs_the_cuda_backend_alone(tmp_path, pip):
    asked, answering = pip
    run = answering(
        lambda more: (1, COMPILERS_WORDS) if more["SPEFT_BUILD_CUDA"] == "1" else (0, "")
    )
    built = install.install("90a", run, tmp_path)
    # setup.py leaves the kernels out in silence where it finds no nvcc, unless it is told to build.
    with_cuda = {"SPEFT_BUILD_CUDA": "1", "SPEFT_CUDA_ARCHS": "90a"}
    assert asked == [with_cuda, {"SPEFT_BUILD_CUDA": "0"}]
    assert built.python == sys.executable
    assert 'block_grad.cu(12): error: identifier "wgmma" is undefined' in built.error
    # Known from then on, and not taken for a build of all.
    assert install.install("90a", run, tmp_path) == built
    assert len(asked) == 2


def test_cuda_kernels_that_were_built_and_cannot_be_imported_are_an_error(
    tmp_path, pip, monkeypatch
):
    asked, answering = pip

    def refused(python, with_cuda=False, more=None):
        return "undefined symbol: speft_f" if with_cuda else ""

    monkeypatch.setattr(install, "import_error", refused)
    built = install.install("90a", answering(lambda more: (0, "")), tmp_path)
    assert built == install.Built(sys.executable, "undefined symbol: speft_f")
    assert len(asked) == 2


def test_what_was_built_without_nvcc_is_built_again_where_there_is_one(tmp_path, pip, monkeypatch):
    asked, answering = pip
    monkeypatch.setattr(install, "CUDA", tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    run = answering(lambda more: (int(more["SPEFT_BUILD_CUDA"]), "error: there is no nvcc"))
    assert install.install("90a", run, tmp_path).error == "error: there is no nvcc"
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    install.install("90a", run, tmp_path)
    assert len(asked) == 4


def test_imports_that_fail_are_told_in_the_words_of_python(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ncase $2 in *_cuda*) echo 'ImportError: no symbol' >&2; exit 1;; esac\n"
    )
    python.chmod(0o755)
    assert install.import_error(str(python)) == ""
    assert install.import_error(str(python), with_cuda=True) == "ImportError: no symbol"


def test_kernels_that_cannot_run_are_said_loudly(checking, monkeypatch):
    """As where the package was built, and torch sees no GPU."""
    monkeypatch.setattr(install, "install", lambda archs, run: install.Built(sys.executable))
    checking.run("build", force=False)
    build = checking.write()["stages"]["build"]
    assert build["status"] == "failed"
    first, second = build["detail"].splitlines()
    assert first.startswith("CUDA kernels CANNOT RUN: ")
    assert second.startswith("Triton kernels CANNOT RUN: there is no CUDA device")
    assert not checking.with_cuda


def test_where_pip_installs_nothing_the_package_is_built_in_place(tmp_path, pip, monkeypatch):
    asked, answering = pip
    monkeypatch.setenv("PYTHONPATH", "/before")
    run = answering(lambda _: (0, "") if "--inplace" in answering.commands[-1] else (1, "no pip"))
    built = install.install("90a", run, tmp_path)
    assert (built.python, built.error, built.pip) == (sys.executable, "", "no pip")
    assert built.more["PYTHONPATH"].split(":")[1:] == [str(ROOT), "/before"]
    assert [more["SPEFT_BUILD_CUDA"] for more in asked] == ["1", "0", "1"]
    assert answering.commands[-1][1:] == [str(ROOT / "setup.py"), "build_ext", "--inplace"]
    assert install.install("90a", run, tmp_path) == built
    assert len(asked) == 3


def test_a_file_that_nvcc_refuses_in_place_costs_the_cuda_backend_alone(tmp_path, pip):
    _, answering = pip

    def answer(more):
        if "--inplace" not in answering.commands[-1]:
            return 1, "no pip"
        return (1, COMPILERS_WORDS) if more["SPEFT_BUILD_CUDA"] == "1" else (0, "")

    built = install.install("90a", answering(answer), tmp_path)
    assert (built.python, built.pip) == (sys.executable, "no pip")
    assert "block_grad.cu(12): error" in built.error


def test_a_package_in_its_repository_is_found_by_pythonpath(tmp_path, monkeypatch):
    """Triton's kernels, which lie beside it, as well; and a module that Python imports when it
    starts is not hidden by ours.
    """
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys; sys.theirs = True\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    more = install._found_by_path(tmp_path / "path")
    program = (
        "import importlib.util, sys\n"
        "print(importlib.util.find_spec('speft_kernels.triton_kernels').origin, sys.theirs)\n"
    )
    # A Python without the packages that are installed here, and so without an editable finder.
    command = [sys._base_executable, "-c", program]
    done = subprocess.run(command, cwd="/", env=more, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / "triton_kernels" / "__init__.py"), "True"], (
        done.stderr
    )


def test_a_build_in_place_counts_and_the_record_tells_of_it(checking, monkeypatch, capfd):
    built = install.Built(sys.executable, pip="No module named pip", more={"SPEFT_FOUND": "here"})
    monkeypatch.setattr(install, "install", lambda archs, run: built)
    monkeypatch.setattr(install, "lacking", lambda python, more: {})
    command = [sys.executable, "-c", "import os; print('found', os.environ['SPEFT_FOUND'])"]
    monkeypatch.setattr(checking, "_command", lambda *_, again: (command, {}))
    checking.run("kernels", force=False)
    assert checking.with_cuda
    found = checking.write()["stages"]
    assert (found["build"]["status"], found["kernels"]["status"]) == ("complete", "complete")
    assert found["build"]["detail"].endswith("pip failed: No module named pip")
    assert "found here" in capfd.readouterr().out


def test_tools_of_cuda_are_sought_where_setup_py_seeks_nvcc(tmp_path, monkeypatch):
    def tool(folder):
        path = tmp_path / folder / "tool"
        path.parent.mkdir(parents=True)
        path.write_text("")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setattr(install, "CUDA", tmp_path / "default")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert install.cuda_tool("tool") is None
    for folder in ("default/bin", "path", "home/bin"):
        found = tool(folder)
        assert install.cuda_tool("tool") == found
    monkeypatch.delenv("CUDA_HOME")
    assert install.cuda_tool("tool") == str(tmp_path / "path" / "tool")


def test_an_error_of_pytest_is_no_lack_of_time(checking, monkeypatch):
    """It ends with the status that tells of that in the other stages."""
    monkeypatch.setattr(checking, "built", True)
    monkeypatch.setattr(checking, "python", sys.executable)
    command = [sys.executable, "-c", f"raise SystemExit({stages.OUT_OF_TIME})"]
    monkeypatch.setattr(checking, "_command", lambda *_, again: (command, {}))
    ended = {}
    for stage in ("test", "kernels"):
        checking.run(stage, force=False)
        ended[stage] = checking.journal(stage).status()
    assert ended == {"test": "failed", "kernels": "out of time"}


def test_what_does_not_build_at_all_says_why(tmp_path, pip):
    _, answering = pip
    run = answering(lambda more: (1, "first\nno compiler found"))
    assert install.install("90a", run, tmp_path) == install.Built(None, "first\nno compiler found")


def test_a_build_that_is_out_of_time_is_not_taken_for_one_that_fails(tmp_path, pip):
    asked, answering = pip
    built = install.install("90a", answering(lambda more: (None, "[3/9] compile")), tmp_path)
    assert built.python is None
    assert "out of time" in built.error
    assert len(asked) == 1


def test_kernels_of_an_older_build_are_removed(tmp_path):
    for name in ("_cuda.cpython-312.so", "_cuda_host.cpython-312.so", "_C.cpython-312.so"):
        (tmp_path / name).touch()
    install._remove_older_kernels(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"_cuda_host.cpython-312.so", "_C.cpython-312.so"}


def test_stages_go_on_without_the_cuda_kernels_and_the_record_says_so(
    checking, monkeypatch, capsys
):
    built = install.Built(sys.executable, "a.cu(1): error: no")
    monkeypatch.setattr(install, "install", lambda archs, run: built)
    monkeypatch.setattr(install, "lacking", lambda python, more: {})
    monkeypatch.setattr(checking, "_command", lambda *_, again: ([sys.executable, "-c", ""], {}))
    for stage in check.STAGES:
        checking.run(stage, force=False)
    found = checking.write()
    assert found["stages"]["build"]["status"] == "failed"
    assert found["stages"]["kernels"]["status"] == found["stages"]["step"]["status"] == "complete"
    assert "sanitize: not run, since the CUDA kernels were not built" in capsys.readouterr().out
    assert found["status"] == "complete but for build (failed), sanitize (not run)"
    assert "build: without the CUDA kernels, everything else goes on: a.cu(1): error: no" in (
        checking.out / record.TABLE
    ).read_text(encoding="utf-8")


def test_what_the_build_says_is_read_out_of_its_own_part_of_the_log(checking):
    (checking.out / "build.log").write_text("an older error\n")
    command = [sys.executable, "-c", "print('a.cu: error'); raise SystemExit(3)"]
    assert checking._install_run(command, {}) == (3, "a.cu: error\n")


def test_a_stage_that_is_not_complete_is_named_and_blames_no_other(tmp_path):
    for stage in check.STAGES:
        status = "out of time" if stage == "sanitize" else "complete"
        Journal(tmp_path / journal.NAME, stage, "abc", "H200").add("stage", status=status)
    found = record.build(tmp_path, "H200", lambda stage: "abc")
    assert found["status"] == "complete but for sanitize (out of time)"
    Journal(tmp_path / journal.NAME, "sanitize", "abc", "H200").add("stage", status="complete")
    assert record.build(tmp_path, "H200", lambda stage: "abc")["status"] == "complete"


def test_the_suite_is_collected_where_pytest_timeout_is_missing(checking):
    """Its limit in pyproject.toml is an unknown option then."""
    collected = {}
    for has_plugin in (False, True):
        checking.machine = replace(H200, timeout=has_plugin)
        command, _ = checking._command("test", sys.executable, 100.0, again=False)
        without = ["-p", "no:timeout", "--collect-only", "-k", "an_index_beyond_int32"]
        done = subprocess.run([*command, *without], cwd=ROOT, capture_output=True, text=True)
        collected[has_plugin] = done.returncode
    assert collected == {False: 0, True: 4}  # 4: pytest refuses its command line


def test_the_default_folder_is_one_that_git_ignores():
    assert check.OUT.parts[: len(ROOT.parts) + 1] == (*ROOT.parts, "build")
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_card_is_asked_for_by_its_own_name(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > $(dirname $0)/called\necho 580.1, 1755\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert device._reported("12-34") == {"driver": "580.1", "sm_mhz_busy": "1755"}
    assert (tmp_path / "called").read_text().split()[-1] == "--id=GPU-12-34"
    assert device._reported("") == {}


# The suite under pytest-xdist


@pytest.fixture
def suite(monkeypatch):
    """The plugin of the GPU suite."""
    folder = ROOT / "tests" / "gpu"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("gpu_suite", folder / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_workers_are_replaced_as_often_as_they_end_and_share_the_cores(checking):
    checking.machine = replace(H200, xdist=True)
    command, more = checking._command("test", sys.executable, 100.0, again=False)
    assert command[command.index("-n") + 1] == "8"
    assert int(command[command.index("--max-worker-restart") + 1]) >= 1000
    assert int(more["OMP_NUM_THREADS"]) * 8 <= H200.cores
    checking.machine = H200
    command, more = checking._command("test", sys.executable, 100.0, again=False)
    assert "--max-worker-restart" not in command  # an option of the plugin that is not there
    assert "OMP_NUM_THREADS" not in more


def test_a_generator_that_a_failed_capture_has_spoilt_is_a_lost_device(suite, monkeypatch):
    def refused(*_, device):
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "randn", lambda *_, device: None)
    assert not suite._is_lost()
    monkeypatch.setattr(torch, "randn", refused)
    assert suite._is_lost()


def outcome(name, when, message):
    crash = SimpleNamespace(message=message)
    return SimpleNamespace(
        **{"nodeid": name, "when": when, "outcome": "failed", "duration": 0.0},
        **{"longrepr": SimpleNamespace(reprcrash=crash), "user_properties": []},
    )


def test_a_worker_that_ends_after_a_failure_does_not_hide_its_reason(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_journal", Journal(tmp_path / journal.NAME, "test", "abc", "H200"))
    suite.pytest_runtest_logreport(outcome("a", "call", "illegal memory access"))
    for name in "ab":
        suite.pytest_runtest_logreport(outcome(name, "???", "worker 'gw1' crashed"))
    found = record.build(tmp_path, "H200", lambda stage: "abc")["tests"]
    assert found["failures"] == {"a": "illegal memory access", "b": "worker 'gw1' crashed"}


def test_the_operations_are_tested_first_and_what_takes_most_memory_last(suite):
    folder = ROOT / "tests" / "gpu"
    names = sorted(path.stem.removeprefix("test_gpu_") for path in folder.glob("test_gpu_*.py"))
    assert names == sorted(suite.ORDER)

    class Item(SimpleNamespace):
        __hash__ = object.__hash__

        def add_marker(self, marker):
            pass

    elsewhere = Item(path=ROOT / "tests" / "test_plan.py", nodeid="elsewhere")
    items = [Item(path=folder / f"test_gpu_{name}.py", nodeid=name) for name in names]
    items.insert(3, elsewhere)
    suite.pytest_collection_modifyitems(None, items)
    assert items.pop(3) is elsewhere
    assert [item.nodeid for item in items] == list(suite.ORDER)
    assert suite.ORDER[:2] == ("operations", "sampled_grad")
    assert suite.ORDER[-1] == "beyond_int32"


@pytest.mark.parametrize(
    ("words", "out", "wanted"),
    [
        ([], check.OUT, list(check.STAGES)),
        (["step"], check.OUT, ["step"]),
        (["build/gpu_check", "build", "small"], ROOT / "build" / "gpu_check", ["build", "small"]),
        (["./results"], ROOT / "results", list(check.STAGES)),
        (["folder", "test"], ROOT / "folder", ["test"]),
    ],
)
def test_the_first_word_that_is_no_stage_is_the_folder(words, out, wanted, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check._split(words, argparse.ArgumentParser()) == (out, wanted)


def test_a_misspelt_stage_is_no_folder(capsys):
    with pytest.raises(SystemExit):
        check._split(["tets"], argparse.ArgumentParser())
    message = capsys.readouterr().err
    assert "Did you mean 'test'? A new folder is ./tets" in message
