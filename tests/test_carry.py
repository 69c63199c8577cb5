"""What an optimizer remembers goes along with a mask that moves."""

import math

import pytest
import torch
from moving import BLOCKS, Training
from tiny_models import mlp_config, pair_batches, pair_loss
from torch import nn

from speft_kernels.carry import carry
from speft_kernels.dynamic import MovingMask
from speft_kernels.flat import FlatValues
from speft_kernels.model import sparse_layers, sparsify


def test_rigl_keeps_the_moments_of_those_that_stay():
    training = Training("rigl")
    training.steps()
    state = {k: v.clone() for k, v in training.optimizer.state[training.flat].items()}
    move = training.move()
    now = training.optimizer.state[training.flat]
    assert now["step"] == state["step"]
    before = after = 0
    for name, layer in sparse_layers(training.model).items():
        origin, size = move.origins[name], layer.values.numel()
        for key in ("exp_avg", "exp_avg_sq"):
            own = now[key][after : after + size]
            assert torch.equal(own[origin >= 0], state[key][before:][origin[origin >= 0]])
            anew = own[origin < 0]
            if key == "exp_avg":
                assert not anew.any()
            else:  # from zero, the first steps would be several times the learning rate
                assert (anew > 0).all()
        before, after = before + move.old_units[name], after + size
    training.steps(1)  # and the optimizer goes on with them


class Branches(nn.Module):
    """Two linear layers side by side."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], dim=1)


@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True, "amsgrad": True}, {}])
def test_what_grows_takes_steps_of_the_learning_rate(settings, scale, scope, block_shape):
    """Under constant gradients; `scale` is that of those the optimizer sees, as if clipped."""
    torch.manual_seed(0)
    model, lr = Branches(), 1e-3
    batch = (torch.randn(32, 12), 100 * torch.randn(32, 24))

    def loss(model, batch):
        return (model(batch[0]) * batch[1]).mean()

    def step():
        before = flat.detach().clone()
        (scale * loss(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return (flat.detach() - before).abs() / lr

    config = mlp_config(
        density=0.1, modules_to_train=(), salience="gradient", scope=scope, block_shape=block_shape
    )
    sparsify(model, config, [batch], loss)
    mask, flat = MovingMask(model, config, "rigl"), FlatValues(model).parameter
    optimizer = torch.optim.AdamW([flat], lr=lr, weight_decay=0, **settings)
    for _ in range(300):
        step()
    # An iterator: the gradients are gone over twice.
    move = mask.update(model, iter([batch]), loss, progress=0.0)
    old, flat = flat, FlatValues(model).parameter
    carry(optimizer, old, flat, model, move, True)
    grown = torch.cat([move.origins[name] for name in sparse_layers(model)]) < 0
    grown = grown.repeat_interleave(math.prod(block_shape))
    assert grown.any()
    for number in range(1, 41):
        sizes = step()
        # The first moment starts from zero: 1 - 0.9^n of the learning rate, and never more. The
        # gradients of those that stayed are averaged, which their moments forget in 1000 steps.
        torch.testing.assert_close(
            sizes[grown], torch.full_like(sizes[grown], 1 - 0.9**number), rtol=0.02, atol=0
        )
        assert (sizes[~grown] < 1.01).all()


def test_moments_of_an_optimizer_that_has_no_second_ones_start_from_zero():
    training = Training("rigl")
    training.optimizer = torch.optim.SGD([training.flat], lr=0.05, momentum=0.9)
    training.steps()
    move = training.move()
    (moments,) = training.optimizer.state[training.flat].values()
    grown = torch.cat([move.origins[name] for name in sparse_layers(training.model)]) < 0
    assert not moments[grown].any()
    assert moments[~grown].all()


def test_second_moments_start_from_the_gradients_where_nothing_stayed_to_compare():
    """Every second moment of those that stay is zero, as before a first gradient."""
    training = Training("rigl")
    training.steps()
    training.optimizer.state[training.flat]["exp_avg_sq"].zero_()
    move = training.move()
    found = training.optimizer.state[training.flat]["exp_avg_sq"]
    squares = torch.cat([part.reshape(-1) for part in move.squares.values()])
    grown = torch.cat([move.origins[name] for name in sparse_layers(training.model)]) < 0
    assert torch.equal(found[grown], squares[grown])
    expected = torch.zeros_like(squares)
    for batch in pair_batches(3, seed=1):
        training.model.zero_grad()
        training.model.eval()
        pair_loss(training.model, batch).backward()
        values = [layer.values.grad.reshape(-1) for layer in sparse_layers(training.model).values()]
        expected += torch.cat(values).square() / 3
    torch.testing.assert_close(squares, expected)


def test_rigl_forgets_the_moments_of_what_it_drops_and_grows_again():
    """Where the dropped have the largest gradients, the mask stays and a share starts anew."""
    training = Training("rigl")
    training.steps()
    layers = sparse_layers(training.model)
    patterns = training.patterns()

    def loss(model, batch):  # the gradient is 1 in what trained, 0 elsewhere
        weights = [(model.get_submodule(name).weight, layers[name].pattern) for name in layers]
        trained = sum(w.view(-1)[p.indices.long()].sum() for w, p in weights)
        return trained + 0 * pair_loss(model, batch)  # which calls the layers

    move = training.mask.update(training.model, training.batches, loss, progress=0.0)
    assert training.patterns() == patterns
    assert move.moved == 0
    for name, layer in sparse_layers(training.model).items():
        anew = move.origins[name] < 0
        assert anew.sum() == round(0.3 * anew.numel()) > 0
        assert not layer.values[anew].any()
        assert layer.values[~anew].all()


def test_moments_go_along_beside_values_that_are_frozen():
    training = Training("rigl")
    first = sparse_layers(training.model)["first"]
    first.sink.release()
    first.values.requires_grad_(False)
    training.flat = FlatValues(training.model).parameter
    training.optimizer = torch.optim.Adam([training.flat], lr=0.05)
    training.steps()
    before = training.optimizer.state[training.flat]["exp_avg"]
    move = training.move()
    after, origin = training.optimizer.state[training.flat]["exp_avg"], move.origins["second"]
    again = origin >= 0
    assert torch.equal(after[again], before[origin[again]])
    assert not after[~again].any()
    assert not sparse_layers(training.model)["first"].values.requires_grad
    training.steps()
