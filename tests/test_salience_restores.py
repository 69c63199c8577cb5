"""Every metric gives the model back bit for bit, whatever goes wrong and wherever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Snapshot, bert_classifier, llama, pair_batches, pair_loss, token_batches
from torch import Tensor, nn

from speft_kernels import ops
from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import SpeftConfig, score_and_select
from speft_kernels.salience import METRICS, synflow
from speft_kernels.salience.synflow import absolute_parameters

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters as integers: torch.equal knows no -0.0, and no NaN is equal."""
    return {
        name: p.data.view(INTEGERS[p.element_size()]).clone()
        for name, p in model.named_parameters()
    }


def assert_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, found in bits(model).items():
        assert torch.equal(found, expected[name]), name


class Net(nn.Module):
    """Linear layers, one tied to an embedding, and parameters of every awkward kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.second.weight
        self.view = nn.Parameter(self.first.weight.detach()[1:3].t())  # shared memory, not whole
        self.scalar = nn.Parameter(torch.tensor(-3.0))
        self.narrow = nn.Parameter(torch.randn(9).bfloat16())
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.counter = nn.Parameter(torch.tensor([-1, 2]), requires_grad=False)
        with torch.no_grad():
            self.first.bias[0], self.first.bias[1] = -0.0, 0.0
            self.first.weight[0, 0] = -0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.second(torch.relu(self.first(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def net_loss(model: nn.Module, batch: Any) -> Tensor:
    if batch is None:
        return model(torch.ones(1, 6))
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def net_config(metric: str, **settings: Any) -> SpeftConfig:
    return SpeftConfig(
        salience=metric, density=0.1, mode="additive", target_modules=("first", "tied"), **settings
    )


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_metric_leaves_the_model_alone(metric: str, scope: str, count: int) -> None:
    model = net().train()
    model.second.eval()
    model.first.weight.grad = torch.ones(6, 6)
    before, exact, random = Snapshot(model), bits(model), torch.get_rng_state()
    score_and_select(model, net_config(metric, scope=scope), pair_batches(count), net_loss)
    before.assert_untouched()
    assert_bits(model, exact)
    assert torch.equal(torch.get_rng_state(), random)


class FaultError(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise FaultError("here")


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("stage", ["forward", "backward", "ranking", "interrupt"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_errors_at_each_stage(
    metric: str, stage: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`call` counts the forward passes; GraSP's second pass begins with the third."""
    seen: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = net_loss(model, batch)
        seen.append(1)
        if len(seen) == call and stage in ("forward", "interrupt"):
            raise FaultError("here") if stage == "forward" else KeyboardInterrupt
        if len(seen) == call and stage == "backward":
            output.register_hook(fail)
        return output

    if stage == "ranking":
        monkeypatch.setattr(ops, "topk_salience", fail)
    model = net().train()
    before, exact = Snapshot(model), bits(model)
    passes = {"none": 0, "synaptic_flow": 1, "hessian_gradient": 4}
    failing = (
        metric != "random"
        if stage == "ranking"
        else call <= passes.get(METRICS[metric].statistic, 2)
    )
    if failing:
        with pytest.raises((FaultError, ConfigError, KeyboardInterrupt)):
            score_and_select(model, net_config(metric), pair_batches(2), loss)
    else:
        score_and_select(model, net_config(metric), pair_batches(2), loss)
    before.assert_untouched()
    assert_bits(model, exact)
    assert (torch.ones(2) * -1).relu().tolist() == [0, 0]  # no function is linear any more


@pytest.mark.parametrize("metric", [m.key for m in METRICS.values() if m.needs_statistic])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_score_that_is_not_finite_names_metric_and_layer(metric: str, scope: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if batch is None:  # a finite sum of infinite derivative
            return (model.tied(torch.zeros(1, 6)) - model.tied.bias).square().sum().sqrt()
        hidden = model.tied(torch.tanh(model.first(batch[0])).detach())
        return net_loss(model, batch) + (hidden * 0).sum().square().sqrt()

    model = net()
    exact = bits(model)
    config = SpeftConfig(
        salience=metric, scope=scope, mode="additive", target_modules=("tied",), density=0.1
    )
    with pytest.raises(SalienceError, match=f"the {metric} score of layer 'tied' has NaN"):
        score_and_select(model, config, pair_batches(2), loss)
    assert_bits(model, exact)


@pytest.mark.parametrize("build", [bert_classifier, llama])
@pytest.mark.parametrize("metric", ["fisher", "grasp", "synflow", "random"])
def test_transformers_are_left_alone(build: Any, metric: str) -> None:
    model = build().train()
    before, exact = Snapshot(model), bits(model)
    batches = token_batches(2, causal=build is llama)
    score_and_select(model, SpeftConfig(salience=metric), batches)
    before.assert_untouched()
    assert_bits(model, exact)


# SynFlow's absolute values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [3, 2**22])
def test_signs_come_back_bit_for_bit(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synflow, "_PIECE", piece)
    size = torch.empty(0, dtype=dtype).element_size()
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    # Any bits at all: infinities, NaN of both signs, -0.0, numbers below the normal ones.
    info = torch.iinfo(INTEGERS[size])
    raw = torch.randint(info.min, info.max, (7, 13), generator=generator).to(INTEGERS[size])
    raw[0, :2] = torch.tensor([info.min, 0])
    model.strange = nn.Parameter(raw.view(dtype))
    model.transposed = nn.Parameter(torch.randn(5, 9, generator=generator).to(dtype).t())
    before = bits(model)
    with absolute_parameters(model):
        for parameter in model.parameters():
            assert not parameter.signbit().any()
            values = parameter[~parameter.isnan()]
            assert torch.equal(values, values.abs())
        assert torch.equal(
            model.transposed, before["transposed"].view(dtype).abs()
        )  # and not only any positive values
    assert_bits(model, before)


def test_absolute_values_keep_a_bit_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    pack = synflow._pack
    monkeypatch.setattr(
        synflow, "_pack", lambda flags: kept.append((out := pack(flags)).nbytes) or out
    )
    with absolute_parameters(nn.Linear(64, 32, bias=False)):
        assert kept == [64 * 32 // 8]


def test_synflow_says_which_models_it_serves() -> None:
    model = net()
    exact = bits(model)
    with pytest.raises(ConfigError, match="a Net is neither: pass a loss_fn.*another metric"):
        score_and_select(model, net_config("synflow"))
    with pytest.raises(ConfigError, match=r"calls loss_fn\(model, None\), which raised TypeError"):
        score_and_select(model, net_config("synflow"), None, pair_loss)
    assert_bits(model, exact)


def test_a_flow_that_overflows_names_the_layer() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    for layer in model:
        nn.init.constant_(layer.weight, -1e8)
    exact = bits(model)
    with pytest.raises(SalienceError, match="flow is inf; layer '4' is the first.*wider dtype"):
        score_and_select(model, SpeftConfig(salience="synflow", target_modules=("0", "1")))
    assert_bits(model, exact)


def test_synflow_reports_a_layer_that_the_logits_do_not_depend_on() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model.first(torch.ones(1, 6))

    with pytest.raises(SalienceError, match="layer 'tied' received no synaptic flow"):
        score_and_select(net(), net_config("synflow"), None, forward)
