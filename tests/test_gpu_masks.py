"""Masks that are drawn once for all processes of a GPU check, and files that are not trusted."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from speft_kernels.bench.gpu import drawn, run
from speft_kernels.bench.gpu.device import Device
from speft_kernels.bench.gpu.drawn import Mask
from speft_kernels.bench.gpu.problems import TINY, Spec, Workbench

UNIFORM = Mask((64, 48), "uniform", 0.05)
MASKS = [UNIFORM, Mask((64, 48), "realistic", 0.05, 3), Mask((64, 48), "16x16", 0.5)]


@pytest.fixture
def draws(monkeypatch):
    """The masks that were drawn and not read."""
    asked, draw = [], drawn._drawn

    def noted(of):
        asked.append(of)
        return draw(of)

    monkeypatch.setattr(drawn, "_drawn", noted)
    return asked


@pytest.mark.parametrize("of", MASKS, ids=lambda of: of.kind)
def test_the_next_process_reads_what_was_drawn(of, tmp_path, draws):
    folder = tmp_path / "out" / drawn.FOLDER
    first = drawn.mask(of, folder)
    assert len(list(folder.iterdir())) == 1
    second = drawn.mask(of, folder)
    assert draws == [of]
    assert second == first == drawn.mask(of)
    assert second.block_shape == first.block_shape


def test_each_key_has_a_file_of_its_own(tmp_path, draws):
    others = [UNIFORM._replace(**one) for one in ({"seed": 1}, {"density": 0.1}, {"kind": "8x8"})]
    wanted = [*MASKS, *others, UNIFORM._replace(shape=(48, 64))]
    found = [drawn.mask(of, tmp_path) for of in wanted]
    assert [drawn.mask(of, tmp_path) for of in wanted] == found
    assert len(draws) == len(list(tmp_path.iterdir())) == len(wanted)


def spoil_an_index(path):
    with safe_open(path, "pt") as file:
        indices, facts = file.get_tensor("indices"), file.metadata()
    indices[0] += 1
    save_file({"indices": indices}, path, facts)


def call_them_of_another_dtype(path):
    with safe_open(path, "pt") as file:
        indices, facts = file.get_tensor("indices"), file.metadata()
    save_file({"indices": indices.view(torch.bfloat16)}, path, facts)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"others": torch.ones(1)}, path),
        lambda path: save_file({"indices": torch.ones(1)}, path),
        spoil_an_index,
        call_them_of_another_dtype,
    ],
    ids=["cut off", "empty", "another's", "no facts", "an index", "a dtype"],
)
def test_a_damaged_file_is_drawn_again_and_replaced(spoil, tmp_path, draws):
    first = drawn.mask(UNIFORM, tmp_path)
    (path,) = tmp_path.iterdir()
    spoil(path)
    assert [drawn.mask(UNIFORM, tmp_path) for _ in range(2)] == [first, first]
    assert draws == [UNIFORM, UNIFORM]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_mask_or_of_other_sources_is_not_taken(tmp_path, draws, monkeypatch):
    other = UNIFORM._replace(seed=1)
    drawn.mask(UNIFORM, tmp_path)
    (path,) = tmp_path.iterdir()
    shutil.copy(path, tmp_path / path.name.replace("-0.", "-1."))
    assert drawn.mask(other, tmp_path) == drawn.mask(other)
    monkeypatch.setattr(torch, "__version__", "0.1")
    drawn.mask(UNIFORM, tmp_path)
    assert draws == [UNIFORM, other, other, UNIFORM]


def test_what_cannot_be_kept_is_drawn_all_the_same(tmp_path, draws):
    folder = tmp_path / "masks"
    folder.write_text("a file where the folder is to be")
    assert drawn.mask(UNIFORM, folder) == drawn.mask(UNIFORM)


def test_without_safetensors_it_is_drawn(tmp_path, draws, monkeypatch):
    monkeypatch.setattr(drawn, "find_spec", lambda name: None)
    assert drawn.mask(UNIFORM, tmp_path) == drawn.mask(UNIFORM, tmp_path)
    assert draws == [UNIFORM, UNIFORM]
    assert not list(tmp_path.iterdir())


def test_a_stage_keeps_its_masks_beside_its_journal(tmp_path, draws, monkeypatch):
    spec = Spec("block_grad", "q", 512, "16x16")
    monkeypatch.setitem(run.STAGES, "kernels", lambda: [spec])
    monkeypatch.setattr(run, "_measure", lambda spec, bench, journal: None)
    command = [str(tmp_path), "kernels", "--device", "cpu"]
    assert [run.main(command), run.main(command)] == [0, 0]
    assert len(draws) == 1
    assert len(list((tmp_path / drawn.FOLDER).iterdir())) == 1
    bench = Workbench(Device("cpu"), TINY, tmp_path / drawn.FOLDER)
    bench.pattern_of(spec)
    assert len(draws) == 1
