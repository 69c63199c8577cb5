"""The experts of a mixture as linear layers: the same model, which trains, and back again."""

import copy
import pickle
import shutil
import weakref

import pytest
import torch
from tiny_models import Snapshot, gpt_oss, llama, mixtral, token_batches
from tiny_text import save_llama, write_sums
from torch import nn

from speft_kernels import (
    FlatValues,
    SpeftConfig,
    desparsify,
    join_experts,
    load_adapter,
    save_adapter,
    sparse_layers,
    sparsify,
    split_experts,
)
from speft_kernels.cli import main
from speft_kernels.errors import AdapterError, ConfigError
from speft_kernels.experts import SplitExperts

transformers = pytest.importorskip("transformers")

MIXTURES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
CONFIG = SpeftConfig(density=0.1, modules_to_train=[])
(BATCH,) = token_batches(1, causal=True)


def loss(model):
    return model(**BATCH, use_cache=False).loss


def gradients(model):
    loss(model).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_split_model_computes_the_same(implementation, make):
    model = make().eval()
    try:
        model.set_experts_implementation(implementation)
    except ImportError as error:
        pytest.skip(str(error))
    split = copy.deepcopy(model)
    assert tuple(split_experts(split)) == MIXTURES
    torch.testing.assert_close(split(**BATCH).logits, model(**BATCH).logits)
    with torch.no_grad():
        torch.testing.assert_close(split(**BATCH).logits, model(**BATCH).logits)
    expected, found = gradients(model), gradients(split)
    for name in MIXTURES:
        for weight in ("gate_up_proj", "down_proj"):
            parts = torch.stack([found[f"{name}.{weight}.{e}.weight"] for e in range(4)])
            wanted = expected[f"{name}.{weight}"]
            if make is gpt_oss:
                wanted = wanted.transpose(1, 2)
                biases = torch.stack([found[f"{name}.{weight}.{e}.bias"] for e in range(4)])
                torch.testing.assert_close(biases, expected[f"{name}.{weight}_bias"])
            torch.testing.assert_close(parts, wanted)
    assert found.keys() - expected.keys() == {n for n in found if ".experts." in n}


class Between:
    """What transformers' decorator adds to a module of experts."""

    def _apply_gate(self, hidden):
        gate, up = hidden.chunk(2, dim=-1)
        return torch.tanh(gate) * up


class Experts(Between, nn.Module):
    """Experts of one token or more each, with or without a gate, as transformers computes them."""

    def __init__(self, gated, transposed, biased, normed):
        super().__init__()
        self.has_gate, self.act_fn = gated, nn.Softplus()
        self.is_transposed, self.has_bias, self.has_post_expert_norm = transposed, biased, normed
        self.first = "gate_up_proj" if gated else "up_proj"
        for name, shape in ((self.first, (12 if gated else 6, 5)), ("down_proj", (5, 6))):
            laid_out = shape[::-1] if transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(3, *laid_out)))
            if biased:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, shape[0])))
        if normed:
            self.post_expert_norm = nn.LayerNorm(5)

    def product(self, name, expert, x):
        weight = getattr(self, name)[expert]
        y = x @ weight if self.is_transposed else weight @ x
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def forward(self, x, chosen, weights):
        rows = []
        for token, experts, by in zip(x, chosen, weights, strict=True):
            row = 0
            for expert, weight in zip(experts, by, strict=True):
                hidden = self.product(self.first, expert, token)
                hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
                output = self.product("down_proj", expert, hidden)
                if self.has_post_expert_norm:
                    output = self.post_expert_norm(output)
                row = row + weight * output
            rows.append(row)
        return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "layout", [(), ("transposed",), ("biased",), ("normed",), ("transposed", "biased", "normed")]
)
@pytest.mark.parametrize("each", [1, 2, 3])
def test_experts_of_every_layout(gated, layout, each):
    flags = [flag in layout for flag in ("transposed", "biased", "normed")]
    experts = Experts(gated, *flags)
    model = nn.ModuleDict({"experts": experts}).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(9, 5, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(3)[:each] for _ in range(9)])
    weights = torch.rand(9, each, dtype=torch.float64)
    wanted = model["experts"](x, chosen, weights)
    with torch.no_grad():  # which is not to freeze them
        split_experts(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model["experts"](x, chosen, weights), wanted)
    assert model["experts"](x[:0], chosen[:0], weights[:0]).shape == (0, 5)
    with torch.no_grad():
        assert model["experts"](x[:0], chosen[:0], weights[:0]).shape == (0, 5)
    join_experts(model)
    assert model["experts"] is experts
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.is_contiguous()


def test_the_weights_are_not_copied_and_come_back_bit_for_bit():
    model = mixtral().bfloat16()
    before = {
        name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()
    }
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    split_experts(model)
    for name in MIXTURES:
        parts = model.get_submodule(name).gate_up_proj
        assert [type(part) for part in parts] == [nn.Linear] * 4
        assert parts[0].weight.data_ptr() == before[f"{name}.gate_up_proj"][1]
    sparsify(model, CONFIG, [BATCH])
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.values.normal_()
    trained = loss(model)
    desparsify(model)
    assert torch.equal(loss(model), trained)
    join_experts(model)
    # Other sums in 16 bits, of which the loss is a mean.
    torch.testing.assert_close(loss(model), trained, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    split_experts(model)
    join_experts(model)
    assert list(model.state_dict()) == list(before)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: address for name, (_, address) in before.items()
    }
    # Without the delta the base is back.
    other = mixtral().bfloat16()
    split_experts(other)
    sparsify(other, CONFIG, [BATCH])
    with torch.no_grad():
        for layer in sparse_layers(other).values():
            layer.values.normal_()
    loss(other)
    desparsify(other, keep_delta=False)
    join_experts(other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name][0]), name
    assert trains == {name: True for name, _ in other.named_parameters()}


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_that_are_split_and_joined_in_inference_mode_train(make):
    model = make()
    weight = weakref.ref(model.get_submodule(MIXTURES[0]).down_proj)
    with torch.inference_mode():
        split_experts(model)
    assert weight() is None  # no weight is there twice
    sparsify(model, CONFIG, [BATCH])
    loss(model).backward()
    with torch.inference_mode():
        desparsify(model)
        join_experts(model)
    model.requires_grad_(True)
    loss(model).backward()


def test_a_write_into_one_expert_is_none_into_the_others():
    """Else a graph that saved those weights could not be gone back through."""
    model = mixtral()
    split_experts(model)
    sparsify(model, CONFIG, [BATCH])
    one, *others = model.get_submodule(MIXTURES[0]).gate_up_proj
    y = sum(other(torch.ones(2, 16, requires_grad=True)).sum() for other in others)
    with torch.no_grad():
        one.values.add_(1.0)
    one.sync()
    y.backward()


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_that_were_moved_are_joined_by_a_copy(make):
    model = make()
    wanted = {name: tensor.double() for name, tensor in model.state_dict().items()}
    split_experts(model)
    model.double()
    join_experts(model)
    assert model.state_dict().keys() == wanted.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert model.get_submodule(MIXTURES[0]).gate_up_proj.is_contiguous()


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_train_sparsely_and_an_adapter_brings_them(make, mode, scope, tmp_path):
    model = make()
    split_experts(model)
    config = SpeftConfig(density=0.1, mode=mode, scope=scope, modules_to_train=[])
    report = sparsify(model, config, [BATCH])
    assert report.notes == ()
    names = [
        f"{m}.{w}.{e}" for m in MIXTURES for w in ("gate_up_proj", "down_proj") for e in range(4)
    ]
    assert set(names) <= set(sparse_layers(model))
    optimizer = torch.optim.Adam([FlatValues(model).parameter], lr=0.05)
    losses = []
    for _ in range(5):
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    save_adapter(model, tmp_path / "adapter", config=config)
    other = make()
    before = Snapshot(other)
    with pytest.raises(AdapterError, match=r"no layer '.*experts.*\d'.* Split the model's experts"):
        load_adapter(other, tmp_path / "adapter")
    before.assert_untouched()
    split_experts(other)
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(loss(other), loss(model))
    desparsify(other)
    join_experts(other)
    torch.testing.assert_close(loss(other), loss(model))


def test_an_expert_that_no_token_reaches_has_a_gradient_of_zero():
    """Scoring takes a layer without one for a fault, and DDP waits for it."""
    model = mixtral(experts=64)
    split_experts(model)
    found = gradients(model)
    parts = [found[f"{MIXTURES[0]}.gate_up_proj.{expert}.weight"] for expert in range(64)]
    unreached = sum(not part.any() for part in parts)
    assert 0 < unreached < 64
    (note,) = sparsify(model, CONFIG, [BATCH]).notes
    assert "fewer entries score above zero than are to train" in note
    loss(model).backward()
    assert all(layer.values.grad is not None for layer in sparse_layers(model).values())
    called = []
    for layer in sparse_layers(model).values():
        layer.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        loss(model)
    assert len(called) == 2 * 4 + 2 * sum(
        len(set(torch.unique(chosen).tolist())) for chosen in routed(model)
    )


def routed(model):
    """What experts each mixture chooses."""
    chosen = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        for name in MIXTURES
    ]
    with torch.no_grad():
        loss(model)
    for hook in hooks:
        hook.remove()
    return chosen


def test_copies_and_pickles_of_a_split_model():
    model = mixtral()
    split_experts(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(loss(other), loss(model))
        join_experts(other)
        torch.testing.assert_close(loss(other), loss(model))
    assert isinstance(model.get_submodule(MIXTURES[0]), SplitExperts)


def test_what_cannot_be_split_or_joined_is_refused():
    model = llama()
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts that can be split"):
        split_experts(model)
    with pytest.raises(ConfigError, match="no split experts"):
        join_experts(model)
    model = mixtral()
    handle = model.get_submodule(MIXTURES[1]).register_forward_hook(lambda *_: None)
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=rf"'{MIXTURES[1]}' cannot be replaced: it has hooks"):
        split_experts(model)
    before.assert_untouched()
    handle.remove()
    split_experts(model)
    sparsify(model, CONFIG, [BATCH])
    with pytest.raises(
        ConfigError, match=r"gate_up_proj.0' is a SparseDeltaLinear: call desparsify"
    ):
        join_experts(model)
    assert len(sparse_layers(model)) == 2 * (4 + 8)


def test_a_model_that_is_nothing_but_experts_is_refused():
    """It would lose its parameters, and nothing would take their place."""
    experts = mixtral().get_submodule(MIXTURES[0])
    before = Snapshot(experts)
    with pytest.raises(ConfigError, match="wrap it in an nn.Sequential"):
        split_experts(experts)
    before.assert_untouched()
    model = nn.Sequential(experts)
    split_experts(model)
    with pytest.raises(ConfigError, match="wrap it in an nn.Sequential"):
        join_experts(model[0])
    join_experts(model)
    assert list(model.state_dict()) == ["0.gate_up_proj", "0.down_proj"]


def test_experts_of_other_layouts_stay_as_they_are():
    for change in (
        lambda experts: setattr(experts, "_is_expert_parallel", True),
        lambda experts: experts.register_parameter("scale", nn.Parameter(torch.ones(3))),
        lambda experts: setattr(experts, "has_bias", True),
        lambda experts: setattr(experts, "down_proj", nn.Parameter(torch.ones(5, 6))),
    ):
        model = nn.ModuleDict({"experts": Experts(True, False, False, False)})
        change(model["experts"])
        before = Snapshot(model)
        with pytest.raises(ConfigError, match="no experts that can be split"):
            split_experts(model)
        before.assert_untouched()


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sums to learn, and a mixture to learn them with."""
    folder = tmp_path_factory.mktemp("sums")
    rows = write_sums(folder)
    save_llama(folder / "model", [row["prompt"] for row in rows])
    vocabulary = transformers.AutoConfig.from_pretrained(folder / "model").vocab_size
    mixtral(vocab_size=vocabulary).save_pretrained(folder / "model")
    return folder


def flags(sums, output, *more):
    own = {"model": sums / "model", "train": sums / "train.jsonl", "eval": sums / "eval.jsonl"}
    own |= {
        "output": output,
        "task": "causal-lm",
        "max-length": 16,
        "batch-size": 4,
        "density": 0.1,
    }
    return [str(part) for key, value in own.items() for part in (f"--{key}", value)] + list(more)


def test_the_command_trains_evaluates_and_merges_experts(sums, tmp_path, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    split = ("--experts", "split")
    assert main(["finetune", *flags(sums, run, *split, "--epochs", "2")]) == 0
    assert "experts.gate_up_proj.0" in (run / "adapter" / "adapter_config.json").read_text()
    assert main(["evaluate", str(run), "--data", str(sums / "eval.jsonl")]) == 0
    of_the_run = capsys.readouterr().out.splitlines()[-1]
    assert main(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    assert main(["evaluate", str(merged), "--data", str(sums / "eval.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == of_the_run
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert whole.get_submodule(MIXTURES[0]).gate_up_proj.shape == (4, 48, 16)

    mask = tmp_path / "mask"
    words = iter(flags(sums, mask, *split))
    scoring = [
        p
        for k, v in zip(words, words, strict=True)
        if k not in ("--eval", "--batch-size")
        for p in (k, v)
    ]
    assert main(["salience", *scoring]) == 0
    masked = flags(sums, tmp_path / "masked", "--mask", str(mask), "--epochs", "1")
    at = masked.index("--density")
    del masked[at : at + 2]
    capsys.readouterr()
    assert main(["finetune", *masked]) == 2
    assert "--experts split" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "masked", ignore_errors=True)
    assert main(["finetune", *masked, *split]) == 0


def test_the_command_splits_for_sparse_training_alone(sums, tmp_path, capsys):
    more = ("--experts", "split", "--method", "full")
    assert main(["finetune", *flags(sums, tmp_path / "run", *more)]) == 2
    assert "experts = 'split' is for method 'speft'" in capsys.readouterr().err
