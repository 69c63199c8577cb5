"""A model within what compiles, replicates or averages it is sparse, saved and loaded as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONFIG, assert_same_contents, contents, filled, trained_mlp
from tiny_models import Snapshot, mlp, pair_batches, pair_loss
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from speft_kernels import FlatValues
from speft_kernels.adapter import load_adapter, read_adapter, save_adapter
from speft_kernels.dynamic import MovingMask
from speft_kernels.errors import ConfigError
from speft_kernels.install import is_sparse
from speft_kernels.model import (
    SpeftConfig,
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


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[None]:
    method = f"file://{tmp_path}/meeting"
    distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=["compile", "data parallel", "processes", "average", "both"])
def wrap(request: pytest.FixtureRequest) -> Wrap:
    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")  # type: ignore[return-value]

    if request.param == "processes":
        request.getfixturevalue("meeting")
    return {
        "compile": compiled,
        "data parallel": nn.DataParallel,
        "processes": DistributedDataParallel,
        "average": AveragedModel,
        "both": lambda model: compiled(nn.DataParallel(model)),
    }[request.param]


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


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh, **settings)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_model_trains_in_additive_mode(meeting: None, dtype: torch.dtype) -> None:
    """Mixed precision of FSDP2 hands out the values, too, in the dtype of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))
    sparsify(model, SpeftConfig(density=0.2, salience="random", mode="additive"))
    twin = copy.deepcopy(model)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    for part in (model, twin):
        pair_loss(part, pair_batches(1)[0]).backward()
    found, expected = sparse_layers(model), sparse_layers(twin)
    for name, layer in expected.items():
        gradient = found[name].values.grad.full_tensor()  # type: ignore[union-attr]
        assert gradient.dtype == torch.float32
        # bfloat16 rounds each product by 2^-9, and the values and their gradient.
        close = {"rtol": 0.0, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(gradient, layer.values.grad, **close)


def test_what_needs_whole_weights_is_refused_of_a_sharded_model(
    meeting: None, tmp_path: Path
) -> None:
    save_adapter(trained_mlp(), tmp_path / "a")
    patterns, _ = score_and_select(mlp(), CONFIG)
    plain, model, resident = mlp(), mlp(), mlp()
    apply_patterns(model, patterns, dataclasses.replace(CONFIG, mode="additive"))
    apply_patterns(resident, patterns, CONFIG)
    for part in (plain, model, resident):
        sharded(part)
    for refused in (
        lambda: save_adapter(model, tmp_path / "b"),
        lambda: load_adapter(model, tmp_path / "a"),
        lambda: load_adapter(plain, tmp_path / "a", mode="additive"),
        lambda: apply_patterns(plain, patterns, CONFIG),
        lambda: sparsify(plain, CONFIG),
        lambda: merge(model),
        lambda: desparsify(model, keep_delta=False),
        lambda: resident(pair_batches(1)[0][0]),
    ):
        with pytest.raises(ConfigError, match='is sharded, as by FSDP2.*mode="additive".*gather'):
            refused()
    assert not (tmp_path / "b").exists()
