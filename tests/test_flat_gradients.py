"""FlatValues: which gradients the buffer holds, whoever adds them."""

import pytest
import torch
from flat_models import sparse_model, values
from torch.utils.checkpoint import checkpoint

from speft_kernels import FlatValues


def test_a_gradient_that_was_replaced_is_added_to():
    model = sparse_model()
    flat = FlatValues(model)
    x = torch.randn(5, 48)
    model(x).sum().backward()
    once = flat.parameter.grad.clone()
    flat.parameter.grad = once.clone()  # as unscaling or reducing out of place does
    model(x).sum().backward()
    torch.testing.assert_close(flat.parameter.grad, 2 * once, rtol=1e-6, atol=0)


def test_a_gradient_that_the_parameter_was_given_first_is_added_to():
    model, other = sparse_model(), sparse_model()
    flat, x = FlatValues(model), torch.randn(5, 48)
    flat.parameter.grad = torch.ones_like(flat.parameter)
    for one in (model, other):
        one(x).sum().backward()
    once = torch.cat([v.grad.flatten() for v in values(other)])
    torch.testing.assert_close(flat.parameter.grad, once + 1)


def backward_for(kind, model, x, y):
    """Gradients of y by one of the ways to ask for some alone; what it returns."""
    of = values(model)
    if kind == "grad of x":
        return torch.autograd.grad(y, [x])
    if kind == "grad of values":
        return torch.autograd.grad(y, [x, of[1], of[3]])
    inputs = {
        "into all": None,
        "into x": [x],
        "into the head": [*model.head.parameters()],
        "into some values": [of[0], of[3]],
    }
    y.backward(inputs=inputs[kind])
    return ()


ALONE = ("into x", "into some values", "grad of x", "grad of values")


@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [
        *((kind, how) for kind in ("into all", "into the head", *ALONE) for how in (None, False)),
        # Of the others a reentrant checkpoint knows nothing: torch refuses to ask it for them.
        *((kind, True) for kind in ("into all", "into the head")),
    ],
)
def test_only_the_gradients_that_are_asked_for_are_added(kind, reentrant):
    found = []
    for flat in (False, True):
        model = sparse_model()
        parameter = FlatValues(model).parameter if flat else None
        torch.manual_seed(3)
        x = torch.randn(5, 48, requires_grad=True)
        for what in ("into all", kind):  # added to a gradient that is there, or not
            y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            returned = backward_for(what, model, x, y.square().sum())
        found.append([*returned, x.grad, *(v.grad.clone() for v in values(model))])
        if parameter is not None:
            apart = torch.cat([v.grad.flatten() for v in values(model)])
            assert torch.equal(parameter.grad, apart)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_for_others_leave_no_buffer_behind():
    model = sparse_model()
    flat = FlatValues(model)
    x = torch.randn(5, 48, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    assert flat.parameter.grad is None
    assert all(v.grad is None for v in values(model))


def penalised(kind, model, flat, x):
    """A backward pass of a loss and of a penalty on the values, which autograd adds by itself."""
    loss = checkpoint(model, x, use_reentrant=True).square().sum() if kind == "of both" else 0.0
    # What is made last is passed back through first.
    whole = kind == "on the parameter" and flat is not None
    penalty = sum(v.abs().sum() for v in ([flat.parameter] if whole else values(model)))
    (loss + penalty).backward()
    if kind == "of some layers":
        model.q(x).square().sum().backward()
    elif kind not in ("alone", "of both"):
        model(x).square().sum().backward()


KINDS = ("first", "alone", "of some layers", "of both", "on the parameter")


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_the_values_is_not_lost(kind, by, to_none):
    """Whatever the buffer holds of the step before, where nothing took part since it was zeroed."""
    trained = []
    for flat in (False, True):
        model = sparse_model()
        with torch.no_grad():
            for v in values(model):
                v.fill_(0.1)
        one = FlatValues(model) if flat else None
        optimizer = torch.optim.SGD(values(model) if one is None else [one.parameter], lr=1e-2)
        torch.manual_seed(2)
        for _ in range(3):
            penalised(kind, model, one, torch.randn(5, 48, requires_grad=True))
            optimizer.step()
            (optimizer if by == "optimizer" else model).zero_grad(set_to_none=to_none)
        trained.append([v.detach().clone() for v in values(model)])
    for one, other in zip(*trained, strict=True):
        # Three steps of gradients of up to 10 that differ in the last bits.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert bool((one != 0.1).all())


@pytest.mark.parametrize("others", [False, True])
def test_gradients_that_are_put_there_by_hand_are_stepped(others):
    model = sparse_model()
    flat = FlatValues(model)
    optimizer = torch.optim.SGD([flat.parameter], lr=1.0)
    x = torch.randn(5, 48)
    for _ in range(2):
        before, given = model.k.values.detach().clone(), torch.randn_like(model.k.values)
        optimizer.zero_grad()
        if others:
            model.q(x).sum().backward()
        model.k.values.grad = given
        optimizer.step()
        torch.testing.assert_close(model.k.values, before - given)
    assert bool(model.q.values.any()) == others


def test_a_penalty_asked_for_by_grad_leaves_no_buffer_behind():
    model = sparse_model()
    flat = FlatValues(model)
    penalty = sum(v.square().sum() for v in values(model)) + flat.parameter.sum()
    torch.autograd.grad(penalty, [*values(model), flat.parameter])
    assert flat.parameter.grad is None
    assert all(v.grad is None for v in values(model))
    flat.release()
    assert not any(v._backward_hooks for v in values(model))
