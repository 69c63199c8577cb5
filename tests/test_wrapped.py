"""A model within what compiles, replicates or averages it is sparse, saved and loaded as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapters import CONFIG, assert_same_contents, contents, filled, trained_mlp
from tiny_models import Snapshot, mlp, pair_batches, pair_loss
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from speft_kernels import FlatValues
from speft_kernels.adapter import load_adapter, read_adapter, save_adapter
from speft_kernels.dynamic import MovingMask
from speft_kernels.install import is_sparse
from speft_kernels.model import (
    apply_patterns,
    desparsify,
    merge,
    score_and_select,
    sparse_layers,
    sparsify,
    summary,
    unmerge,
)
from speft_kernels.overview import unwrapped

Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture(params=["compile", "data parallel", "processes", "average", "both"])
def wrap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Wrap]:
    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")  # type: ignore[return-value]

    if request.param == "processes":
        method = f"file://{tmp_path}/meeting"
        distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield {
        "compile": compiled,
        "data parallel": nn.DataParallel,
        "processes": DistributedDataParallel,
        "average": AveragedModel,
        "both": lambda model: compiled(nn.DataParallel(model)),
    }[request.param]
    if request.param == "processes":
        distributed.destroy_process_group()


def test_an_adapter_is_of_the_model_within(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap(trained_mlp())
    save_adapter(model, tmp_path / "a", config=CONFIG)
    save_adapter(trained_mlp(), tmp_path / "b", config=CONFIG)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    plain, wrapper = mlp(), wrap(mlp())
    load_adapter(plain, tmp_path / "a")
    load_adapter(wrapper, tmp_path / "a")
    assert_same_contents(unwrapped(wrapper), contents(plain))
    assert is_sparse(unwrapped(wrapper))


def test_a_model_is_made_sparse_and_plain_within(wrap: Wrap) -> None:
    wrapper = wrap(mlp())
    patterns, _ = score_and_select(wrapper, CONFIG)
    assert list(patterns) == ["first", "second"]
    apply_patterns(wrapper, patterns, CONFIG)
    assert is_sparse(wrapper)
    assert list(sparse_layers(wrapper)) == ["first", "second"]
    assert [row.layer for row in summary(wrapper).rows] == ["first", "second"]
    flat = FlatValues(wrapper)
    assert flat.parameter.numel() == sum(p.nnz for p in patterns.values())
    unmerge(wrapper)
    merge(wrapper)
    desparsify(wrapper)
    assert not is_sparse(wrapper)
    sparsify(wrapper, CONFIG)
    desparsify(wrapper, keep_delta=False)


def test_a_mask_moves_within(wrap: Wrap, tmp_path: Path) -> None:
    wrapper = wrap(mlp())
    sparsify(wrapper, CONFIG)
    moving = MovingMask(wrapper, CONFIG, "rigl")
    filled(wrapper)
    moving.update(wrapper, pair_batches(2), pair_loss, progress=0.0)
    moving.save(wrapper, tmp_path / "a")
    assert list(read_adapter(tmp_path / "a").layers) == ["first", "second"]
    moving.release(wrapper)
    load_adapter(wrapper, tmp_path / "a")
    loaded = mlp()
    load_adapter(loaded, tmp_path / "a")
    found = sparse_layers(wrapper)
    for name, layer in sparse_layers(loaded).items():
        assert torch.equal(found[name].effective_weight(), layer.effective_weight())


def test_an_adapter_that_does_not_fit_leaves_the_wrapped_model(wrap: Wrap, tmp_path: Path) -> None:
    save_adapter(trained_mlp(), tmp_path / "a")
    wrapper = wrap(mlp(seed=5))
    before = Snapshot(unwrapped(wrapper))
    with pytest.raises(ValueError, match="another base"):
        load_adapter(wrapper, tmp_path / "a")
    before.assert_untouched()
