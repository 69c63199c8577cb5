"""A mask that moves: what is trained, what stays, and that the base is known to the bit."""

import copy
import math

import pytest
import torch
from moving import BLOCKS, Training
from tiny_models import MLP_LAYERS, Mlp, mlp, mlp_config, pair_batches, pair_loss

from speft_kernels.adapter import load_adapter, read_adapter
from speft_kernels.dynamic import Delta, MovingMask, places
from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import sparse_layers, sparsify


def test_places_finds_indices_in_sorted_ones_and_says_what_is_missing():
    among = torch.tensor([2, 5, 9], dtype=torch.int32)
    found = places(torch.tensor([0, 2, 5, 7, 9, 11], dtype=torch.int32), among)
    assert found.tolist() == [-1, 0, 1, -1, 2, -1]
    assert places(torch.tensor([3]), among[:0]).tolist() == [-1]
    assert places(among[:0], among).tolist() == []


@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("strategy", ["merge", "rigl"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_of_a_moved_mask_gives_the_trained_weights_on_the_original_base(
    strategy, scope, block_shape, dtype, tmp_path
):
    training = Training(strategy, scope=scope, block_shape=block_shape, dtype=dtype)
    moved = 0
    for turn in range(3):
        training.steps()
        moved += training.move(turn / 3, seed=turn).moved
    training.steps()
    assert moved > 0  # or this test would show nothing
    expected = training.weights()
    training.mask.save(training.model, tmp_path / "adapter", config=training.config)
    fresh = copy.deepcopy(training.base)
    load_adapter(fresh, tmp_path / "adapter")
    for name, layer in sparse_layers(fresh).items():
        assert torch.equal(layer.weight, expected[name]), name
    x = pair_batches(1, dtype=dtype, seed=3)[0][0]
    assert torch.equal(fresh(x), training.model(x))


def test_the_adapter_loads_into_the_trained_model_itself(tmp_path):
    training = Training("merge")
    training.steps()
    training.mask.save(training.model, tmp_path / "best")
    best = training.weights()
    training.move()
    training.steps()
    training.move(seed=5)
    assert training.mask.left_behind > 0
    training.mask.release(training.model)
    load_adapter(training.model, tmp_path / "best")
    for name, weight in training.weights().items():
        assert torch.equal(weight, best[name]), name


def test_merge_leaves_the_function_alone_and_what_was_learned_where_it_was():
    training = Training("merge")
    training.steps()
    before, old = training.weights(), training.patterns()
    values = {
        n: layer.values.detach().clone() for n, layer in sparse_layers(training.model).items()
    }
    move = training.move()
    assert move.report is not None
    assert move.report.nnz == sum(p.nnz for p in old.values())
    assert move.moved > 0
    for name, weight in training.weights().items():
        assert torch.equal(weight, before[name]), name
    for name, layer in sparse_layers(training.model).items():
        origin = move.origins[name]
        again = origin >= 0
        assert torch.equal(layer.values[again], values[name][origin[again]])
        assert not layer.values[~again].any()
    assert training.flat not in training.optimizer.state  # moments forgotten
    assert training.optimizer.param_groups[0]["params"] == [training.flat]


def test_merge_follows_a_dense_simulation_of_the_paper():
    """W = W0 + the sum of all deltas; at each choice a new value starts at 0, moments at 0."""
    training = Training("merge", dtype=torch.float64)
    dense = copy.deepcopy(training.base)
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    layers = {name: dense.get_submodule(name) for name in MLP_LAYERS}

    def simulate(masks):
        deltas = {n: torch.zeros_like(x.weight, requires_grad=True) for n, x in layers.items()}
        starts = {n: x.weight.detach().clone() for n, x in layers.items()}
        optimizer = torch.optim.Adam(deltas.values(), lr=0.05)
        for batch in pair_batches(3, dtype=torch.float64, seed=7):
            parameters = {f"{n}.weight": starts[n] + masks[n] * d for n, d in deltas.items()}
            loss = pair_loss(lambda x, p=parameters: torch.func.functional_call(dense, p, x), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for n, layer in layers.items():
            layer.weight.data = starts[n] + masks[n] * deltas[n].detach()

    for turn in range(3):
        simulate({n: p.mask().double() for n, p in training.patterns().items()})
        training.steps()
        for name, weight in training.weights().items():
            # Sums in another order; three turns of three steps.
            torch.testing.assert_close(weight, layers[name].weight, rtol=1e-9, atol=1e-11)
        training.move(seed=turn)


@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest(scope, block_shape):
    training = Training("rigl", scope=scope, block_shape=block_shape)
    training.steps()
    deltas = {n: Delta.of(x) for n, x in sparse_layers(training.model).items()}
    sizes = {
        n: d.values.abs().reshape(d.pattern.indices.numel(), -1).sum(1) for n, d in deltas.items()
    }
    groups = [[n] for n in deltas] if scope == "layer" else [list(deltas)]
    move = training.move(progress=0.5)
    share = 0.3 / 2 * (1 + math.cos(math.pi / 2))
    base = dict(training.base.named_modules())
    reference = copy.deepcopy(training.base)  # W0 and what stayed
    for group in groups:
        dropped = grown = 0
        kept_sizes, dropped_sizes = [], []
        for name in group:
            before = set(deltas[name].pattern.indices.tolist())
            after = set(training.patterns()[name].indices.tolist())
            for index, size in zip(
                deltas[name].pattern.indices.tolist(), sizes[name].tolist(), strict=True
            ):
                (kept_sizes if index in after else dropped_sizes).append(size)
            dropped, grown = dropped + len(before - after), grown + len(after - before)
        units = sum(deltas[name].pattern.indices.numel() for name in group)
        # An entry that is dropped may grow again at once, at its base value.
        assert dropped == grown <= round(share * units)
        assert (
            not dropped_sizes
            or max(dropped_sizes) <= sorted(kept_sizes + dropped_sizes)[round(share * units) - 1]
        )
    assert move.moved > 0
    for name, layer in sparse_layers(training.model).items():
        weight, start = training.weights()[name], base[name].weight
        outside = ~layer.pattern.mask()
        assert torch.equal(weight[outside], start[outside])
        new = move.origins[name] < 0
        assert not layer.values[new].any()
        reference.get_submodule(name).weight.data = weight
    # The gradient that growth was judged by: at W0 plus what stayed, where the grown are 0.
    for parameter in reference.parameters():
        parameter.requires_grad_(True)
    for batch in pair_batches(3, seed=1):
        pair_loss(reference, batch).backward()
    for group in groups:
        grown, others = [], []
        for name in group:
            gradient = reference.get_submodule(name).weight.grad.abs()
            (n, k), (bh, bw) = gradient.shape, block_shape
            scores = gradient.reshape(n // bh, bh, k // bw, bw).sum((1, 3)).view(-1)
            pattern, new = training.patterns()[name], move.origins[name] < 0
            grown += scores[pattern.indices.long()[new]].tolist()
            untrained = torch.ones_like(scores, dtype=torch.bool)
            untrained[pattern.indices.long()] = False
            others += scores[untrained].tolist()
        if grown and others:
            assert min(grown) >= max(others) * (1 - 1e-5)


@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.3), (0.5, 0.15), (1.0, 0.0)])
def test_rigl_drops_the_annealed_share(progress, share, scope, block_shape):
    """What is dropped, and what grew in its place, is at its base value; all others have moved."""

    def at_base():
        values = [layer.values for layer in sparse_layers(training.model).values()]
        return [int((v == 0).reshape(len(v), -1).all(1).sum()) for v in values]

    training = Training("rigl", scope=scope, block_shape=block_shape)
    training.steps()
    units = [pattern.indices.numel() for pattern in training.patterns().values()]
    assert at_base() == [0, 0]
    move = training.move(progress=progress)
    if scope == "layer":
        assert at_base() == [round(share * count) for count in units]
    else:
        assert sum(at_base()) == round(share * sum(units))
    assert (move.moved > 0) == (share > 0)


def test_merge_does_not_warm_the_head_up_again():
    config = mlp_config(density=0.2, head_warmup_steps=5)
    model, batches = mlp().eval(), pair_batches(3)
    sparsify(model, config, batches, pair_loss)
    mask, x = MovingMask(model, config, "merge"), batches[0][0]
    head, before = model.head.weight.detach().clone(), model(x).detach()
    mask.update(model, pair_batches(3, seed=1), pair_loss, progress=0.5)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "choice",
    [{"salience": "random"}, {"selection": "sample"}, {"salience": "random", "seed": 2**63 - 1}],
)
def test_merge_draws_anew_each_time(choice):
    training = Training("merge", **choice)
    drawn = [training.patterns()]
    for progress in (0.0, 0.5, 1.0):
        training.mask.update(training.model, training.batches, pair_loss, progress=progress)
        drawn.append(training.patterns())
    assert drawn[0] == drawn[1]  # the model has not trained, nor is there progress
    assert drawn[1] != drawn[2] != drawn[3]


@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("strategy", ["merge", "rigl"])
def test_layers_without_an_entry_take_part(strategy, block_shape, tmp_path):
    """One entry, or block, in the whole model: the other layer trains nothing, until it does."""
    units = sum(layer.weight.numel() for layer in (mlp().first, mlp().second))
    density = 1.4 * block_shape[0] * block_shape[1] / units
    training = Training(strategy, scope="global", block_shape=block_shape, density=density)
    assert sorted(p.indices.numel() for p in training.patterns().values()) == [0, 1]
    for seed in range(4):
        training.steps()
        training.move(seed=seed)
        assert sum(p.indices.numel() for p in training.patterns().values()) == 1
    expected = training.weights()
    training.mask.save(training.model, tmp_path / "adapter")
    fresh = copy.deepcopy(training.base)
    load_adapter(fresh, tmp_path / "adapter")
    for name, layer in sparse_layers(fresh).items():
        assert torch.equal(layer.weight, expected[name]), name


def test_what_was_left_behind_comes_back_from_its_state():
    training = Training("merge")
    training.steps()
    training.move()
    training.steps()
    assert training.mask.left_behind > 0
    expected, state = training.weights(), training.mask.state_dict()
    values = {n: x.values.detach().clone() for n, x in sparse_layers(training.model).items()}
    model = copy.deepcopy(training.base)
    from speft_kernels.model import apply_patterns

    apply_patterns(model, training.patterns(), training.config)
    mask = MovingMask(model, training.config, "merge")
    mask.load_state_dict(model, state)
    for name, layer in sparse_layers(model).items():
        with torch.no_grad():
            layer.values.copy_(values[name])
        layer.sync()
        assert torch.equal(layer.weight, expected[name])


def test_a_state_of_another_model_changes_nothing():
    """Its first layer fits, the second does not."""
    training = Training("merge")
    training.steps()
    training.move()
    state = training.mask.state_dict()
    first, second = state
    assert len(state[first]["indices"]) > 0
    training.mask.release(training.model)
    before = training.weights()
    state[second]["shape"] = (4, 4)
    state[second].update({key: state[second][key][:0] for key in ("indices", "values")})
    with pytest.raises(ValueError, match=f"{second!r} has another shape"):
        training.mask.load_state_dict(training.model, state)
    assert training.mask.left_behind == 0
    training.mask.release(training.model)
    for name, weight in training.weights().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("strategy", ["merge", "rigl"])
def test_all_layers_are_written_at_once(strategy, write_sizes):
    training = Training(strategy)
    training.steps()
    training.move()
    training.steps()
    mask, model = training.mask, training.model
    write_sizes.clear()
    training.move(seed=2)
    # The deltas out into plain layers, for "rigl" once more with what stays, the base back, and
    # what was left behind (under "merge", which leaves some) with the new deltas.
    assert write_sizes == [2] * {"merge": 4, "rigl": 5}[strategy]
    if strategy == "merge":
        state = mask.state_dict()
        write_sizes.clear()
        mask.release(model)
        mask.load_state_dict(model, state)
        assert write_sizes == [2, 2]


def test_bad_settings_are_refused():
    training = Training("merge")
    with pytest.raises(ConfigError, match="unknown strategy 'grow'"):
        MovingMask(training.model, training.config, "grow")
    with pytest.raises(ConfigError, match=r"share must lie in \(0, 1\)"):
        MovingMask(training.model, training.config, "rigl", share=1.0)
    with pytest.raises(ConfigError, match='mode="resident"'):
        MovingMask(training.model, mlp_config(mode="additive"), "merge")
    with pytest.raises(ConfigError, match="no sparse layers"):
        MovingMask(Mlp(), training.config, "merge")


def test_the_adapter_holds_every_entry_with_a_delta_once(tmp_path):
    training = Training("merge")
    training.steps()
    training.move()
    training.steps()
    training.mask.save(training.model, tmp_path / "adapter")
    stored = read_adapter(tmp_path / "adapter")
    trained = sum(p.nnz for p in training.patterns().values())
    assert sum(x.pattern.nnz for x in stored.layers.values()) == trained + training.mask.left_behind


def boom(model, batch):
    raise KeyError("boom")


@pytest.mark.parametrize("strategy", ["merge", "rigl"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_trains_and_what_does_not_stays_so(strategy, fails):
    training = Training(strategy)
    model = training.model
    training.steps(1)
    model.first.bias.requires_grad_(True)
    model.norm.weight.requires_grad_(True)
    model.head.bias.requires_grad_(False)
    model.second.values.requires_grad_(False)
    model.first.bias.grad = torch.ones(10)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        batches = pair_batches(3, seed=1)
        training.mask.update(model, batches, boom if fails else pair_loss, progress=0.0)
    except KeyError:
        assert fails
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model.first.bias.grad, torch.ones(10))


class Once:
    """No iterator, but its batches are there once."""

    def __init__(self, batches):
        self.left = iter(batches)

    def __iter__(self):
        yield from self.left


@pytest.mark.parametrize(
    ("strategy", "at"),
    [("merge", 1), ("merge", 2), ("rigl", 1), ("rigl", 2), ("rigl", 5), ("rigl", None)],
)
def test_after_an_error_the_same_layers_train_on(strategy, at):
    """`at`: of the calls of the loss the one that fails; "rigl" makes three more in the end. None:
    for these there are no batches.
    """
    training = Training(strategy)
    training.steps()
    training.move()
    training.steps()
    before, layers = training.weights(), sparse_layers(training.model)
    left = {name: delta.pattern for name, delta in training.mask._left.items()}
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt("boom")
        return pair_loss(model, batch)

    batches, error, said = pair_batches(3, seed=5), KeyboardInterrupt, "boom"
    if at is None:
        batches, error, said = Once(batches), SalienceError, "the second time there were none"
    with pytest.raises(error, match=said):
        training.mask.update(training.model, batches, failing, progress=0.0)
    found = sparse_layers(training.model)
    assert all(found[name] is layer for name, layer in layers.items())
    assert {name: delta.pattern for name, delta in training.mask._left.items()} == left
    for name, weight in training.weights().items():
        assert torch.equal(weight, before[name]), name
    training.steps()  # of the optimizer that was there, over the values that were there
    for name, weight in training.weights().items():
        assert not torch.equal(weight, before[name]), name
    training.move()


def test_what_an_update_would_lose_is_refused():
    training = Training("merge")
    training.steps()
    training.move()
    handle = training.model.first.register_forward_hook(lambda *_: None)
    layers, batches = sparse_layers(training.model), pair_batches(3, seed=5)
    with pytest.raises(ConfigError, match="'first' cannot be replaced: it has hooks"):
        training.mask.update(training.model, batches, pair_loss, progress=0.5)
    handle.remove()
    assert training.mask.left_behind > 0  # of which the base is known in the weights' dtype alone
    training.model.double()
    with pytest.raises(TypeError, match="base_values and weight must have one dtype"):
        training.mask.update(training.model, batches, pair_loss, progress=0.5)
    assert sparse_layers(training.model) == layers
