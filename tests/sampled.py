"""What tests of sampled_grad share: how x is given, plans by part, and how far sums may differ."""

import functools

import torch
from kernels import accumulator, make_pattern
from plans import mixed_pattern, plan_with

from speft_kernels import SparsityPlan, ops

FORMS = ("whole", "packed")


def at(dense, pattern):
    return dense.reshape(-1)[pattern.entry_indices.long()]


def sampled(dy, x, plan, form, **more):
    """The values with x given as `form` says."""
    packed = form == "packed"
    x = ops.keep_columns(x, plan) if packed else x
    return ops.sampled_grad(dy, x, plan.pattern, plan=plan, packed=packed, **more)


def error_bound(dy, x):
    """By how much two sums of the same products may differ, in whatever order each is summed.

    Each is off by at most M roundings of half `eps` of the sum of the products' magnitudes.
    """
    wide = accumulator(dy.dtype)
    magnitude = (dy.to(wide).abs().t() @ x.to(wide).abs()).max() if dy.numel() else 0
    return float(dy.shape[0] * torch.finfo(wide).eps * magnitude)


def assert_same_sums(ours, theirs, dy, x):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=error_bound(dy, x))


def poisoned(operand, line, poison):
    """The operand with an element of this line replaced."""
    operand = operand.clone()
    operand[140, line] = poison
    return operand


def assert_not_finite_alone(ours, clean, own):
    """Entries `own` are not finite, the others as without the poison."""
    assert own.any()
    assert not ours[own].isfinite().any()
    assert torch.equal(ours[~own], clean[~own])


@functools.cache
def plan_for(part, kind, n, k, device="cpu"):
    pattern = mixed_pattern(n, k) if kind == "mixed" else make_pattern(kind, n, k)
    pattern = pattern.to(device)
    return SparsityPlan.build(pattern) if part == "default" else plan_with(part, pattern)
