"""A mask that moves in several processes: all of them move it as one would over all data."""

import pytest
import torch
from tiny_models import mlp, mlp_config, pair_batches, pair_loss
from torch import distributed, multiprocessing

from speft_kernels.dynamic import MovingMask
from speft_kernels.errors import SalienceError
from speft_kernels.model import sparse_layers, sparsify

CASES = [(strategy, scope) for strategy in ("merge", "rigl") for scope in ("layer", "global")]


def trained(strategy, scope, rank=0, world=1):
    """A sparse model with deltas, the same in all processes, its mask, and batches of this one."""
    model, config = mlp(), mlp_config(density=0.2, scope=scope)
    sparsify(model, config, pair_batches(3)[rank::world], pair_loss)
    generator = torch.Generator().manual_seed(1)
    for layer in sparse_layers(model).values():
        with torch.no_grad():
            layer.values.normal_(generator=generator)
        layer.sync()
    return model, MovingMask(model, config, strategy), pair_batches(3, seed=1)[rank::world]


def patterns(model):
    return {name: layer.pattern.indices for name, layer in sparse_layers(model).items()}


def move(*arguments):
    model, mask, batches = trained(*arguments)
    before = patterns(model)
    mask.update(model, batches, pair_loss, progress=0.0)
    return before, patterns(model)


def fail(rank):
    """Move where the second process alone has a loss that is no number."""
    model, mask, batches = trained("rigl", "layer", rank, 2)
    before = patterns(model)
    factor = float("nan") if rank == 1 else 1.0
    try:
        mask.update(model, batches, lambda *some: factor * pair_loss(*some), progress=0.0)
    except SalienceError as error:
        return str(error), before, patterns(model)


def run_process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    results = {case: move(*case, rank, 2) for case in CASES}
    torch.save((results, fail(rank)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(run_process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_processes_move_the_mask_that_one_would(two_processes, case):
    before, after = move(*case)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # it moves
    for results, _ in two_processes:
        for expected, found in zip((before, after), results[case], strict=True):
            for name, indices in expected.items():
                assert torch.equal(found[name], indices), name


def test_an_error_in_one_process_leaves_the_masks_of_all(two_processes):
    (first, *masks), (second, *others) = (failed for _, failed in two_processes)
    assert "failed in another process" in first
    assert "the loss of batch 1 is nan" in second
    for before, after in (masks, others):
        assert all(torch.equal(before[name], after[name]) for name in before)
