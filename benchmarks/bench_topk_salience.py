"""topk_salience against torch.topk over a materialised score: |w * g|, 16.7 M entries, 0.5 %."""

import pytest
import torch

from speft_kernels import ops

SIZE, DENSITY = 4096, 0.005


def setup(dtype):
    weight, grad = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    k = round(DENSITY * weight.numel())

    def ours():
        return ops.topk_salience([weight], [grad], k, metric="snip")[0]

    def torch_topk():
        return (weight * grad).abs().flatten().topk(k).indices

    if dtype == torch.float32:  # in bf16 the materialised score is rounded, and chooses others
        assert torch.equal(ours().long(), torch_topk().sort().values)
    return ours, torch_topk


@pytest.mark.parametrize(("dtype", "goal"), [(torch.float32, 8), (torch.bfloat16, None)])
def test_topk_salience(compare, dtype, goal):
    ours, theirs = setup(dtype)
    name = str(dtype).removeprefix("torch.")
    compare(f"topk_salience, 16.7 M {name}, 0.5%", ours, theirs, "(w*g).abs().topk(k)", goal, 5)


def test_global_scope(compare):
    weights = [torch.randn(384, 384) for _ in range(36)]
    grads = [torch.randn(384, 384) for _ in range(36)]
    k = round(DENSITY * sum(w.numel() for w in weights))

    def ours():
        return ops.topk_salience(weights, grads, k, metric="snip", scope="global")

    def theirs():
        return torch.cat(
            [(w * g).abs().flatten() for w, g in zip(weights, grads, strict=True)]
        ).topk(k)

    compare("topk_salience, 36 matrices of 384 x 384, global", ours, theirs, "cat, topk", None, 5)
