"""GPT-2's `Conv1D`, which holds the transposed weight: trained as a linear layer, and back."""

import copy
import json
import pickle
import warnings
import weakref

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import Snapshot, gpt2, token_batches
from tiny_text import save_gpt2, write_jsonl, write_tsv
from torch import nn
from torch.nn.utils import prune

from speft_kernels import (
    SparseDeltaLinear,
    SparsePattern,
    SpeftConfig,
    apply_patterns,
    conv1d,
    desparsify,
    load_adapter,
    save_adapter,
    sparse_layers,
    sparsify,
    summary,
)
from speft_kernels.adapter import fingerprint
from speft_kernels.cli import main
from speft_kernels.conv1d import Conv1DLinear, is_conv1d
from speft_kernels.dynamic import MovingMask
from speft_kernels.errors import AdapterError, ConfigError
from speft_kernels.finetune import load_trained
from speft_kernels.install import linear_for_conv1d
from speft_kernels.model import score_and_select

transformers = pytest.importorskip("transformers")

BATCHES = token_batches(2, causal=True)
CONFIG = SpeftConfig(density=0.1, salience="gradient", selection="top", modules_to_train=[])
# c_proj is square: read the wrong way round, its shape would not tell.
SQUARE, WIDE = "transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"


def loss(model):
    return model(**BATCHES[0]).loss


def with_linears(model):
    """The same model of plain linear layers."""
    model = copy.deepcopy(model)
    for name, former in [(n, m) for n, m in model.named_modules() if is_conv1d(m)]:
        linear = nn.Linear(former.nx, former.nf)
        linear.weight = nn.Parameter(former.weight.detach().t().contiguous())
        linear.bias = former.bias
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, linear)
    return model


def drawn(model):
    """`model` with a delta at its trained entries."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
    return model


@pytest.mark.parametrize("settings", [{}, {"mode": "additive"}, {"block_shape": (4, 4)}])
def test_it_trains_as_the_same_model_of_linear_layers(settings):
    config = SpeftConfig(**{**CONFIG.to_dict(), **settings})
    model, linears = gpt2(), with_linears(gpt2())
    assert sparsify(model, config, BATCHES).notes == ()
    sparsify(linears, config, BATCHES)
    assert list(sparse_layers(model)) == list(sparse_layers(linears))
    assert len(sparse_layers(model)) == 8
    for one, other in zip(
        sparse_layers(model).values(), sparse_layers(linears).values(), strict=True
    ):
        assert one.pattern == other.pattern
        assert torch.equal(one.base_weight(), other.base_weight())
    losses = []
    for each in (model, linears):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            losses[-1].append(loss(each))
            losses[-1][-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == losses[1]
    assert losses[0] == sorted(losses[0], reverse=True)
    assert "48 x 16" in str(summary(model))  # as [N, K]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_conv1d_again_afterwards(dtype):
    model = gpt2().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of_conv1d = [weakref.ref(m.weight) for m in model.modules() if is_conv1d(m)]
    sparsify(model, CONFIG, BATCHES)
    assert all(ref() is None for ref in of_conv1d)  # no weight is there twice
    drawn(model)
    trained = loss(model)
    kept = copy.deepcopy(model)
    desparsify(kept)
    assert is_conv1d(kept.get_submodule(SQUARE))
    # Another product of the same numbers: the sums of 64 have other orders.
    torch.testing.assert_close(loss(kept), trained, rtol=64 * torch.finfo(dtype).eps, atol=0)
    desparsify(model, keep_delta=False)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.is_contiguous()
    found = model.get_submodule(WIDE)
    assert (found.nf, found.nx, tuple(found.weight.shape)) == (64, 16, (16, 64))


def test_layers_that_do_not_train_are_left_as_they_were():
    """Those that are excluded, and those that train densely."""
    model = gpt2()
    excluded, dense = model.get_submodule(SQUARE), model.get_submodule(WIDE)
    values = excluded.weight.detach().clone()
    hook = excluded.register_forward_hook(lambda *_: called.append(1))
    called = []
    config = SpeftConfig(
        **{**CONFIG.to_dict(), "exclude_modules": [SQUARE], "modules_to_train": [WIDE]}
    )
    sparsify(model, config, BATCHES)
    assert model.get_submodule(SQUARE) is excluded
    assert model.get_submodule(WIDE) is dense
    assert torch.equal(excluded.weight, values)
    assert dense.weight.requires_grad
    assert not excluded.weight.requires_grad
    called.clear()
    loss(model)
    assert called == [1]
    hook.remove()
    loss(model)
    assert called == [1]


def test_scoring_alone_and_errors_leave_the_model_as_it_was():
    model = gpt2()
    loss(model).backward()  # gradients are put back, too
    before = Snapshot(model)
    patterns, _ = score_and_select(model, CONFIG, BATCHES)
    assert len(patterns) == 8
    before.assert_untouched()

    def failing(model, batch):
        raise RuntimeError("the loss of the caller")

    with pytest.raises(RuntimeError, match="the loss of the caller"):
        sparsify(model, CONFIG, BATCHES, failing)
    before.assert_untouched()
    wrong = {**patterns, SQUARE: SparsePattern((16, 17), torch.tensor([], dtype=torch.int32))}
    with pytest.raises(ConfigError, match=r"pattern is for a weight of shape \(16, 17\)"):
        apply_patterns(model, wrong, CONFIG)
    before.assert_untouched()
    # Of a weight that nobody else has, an equal one comes back.
    model, same = gpt2(), gpt2()
    for each in (model, same):
        each.get_submodule(WIDE).weight.requires_grad_(False)
        each.get_submodule(SQUARE).weight.tag = "mine"
        loss(each).backward()
    score_and_select(model, CONFIG, BATCHES)
    with pytest.raises(RuntimeError, match="the loss of the caller"):
        sparsify(model, CONFIG, BATCHES, failing)
    for (name, found), wanted in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(found, wanted), name
        assert found.requires_grad == wanted.requires_grad, name
        assert (found.grad is None) == (wanted.grad is None), name
        assert found.grad is None or torch.equal(found.grad, wanted.grad), name
        assert found.is_contiguous()
    assert model.get_submodule(SQUARE).weight.tag == "mine"


def test_what_others_have_of_the_model_stays_as_it_was():
    """An optimizer that was made before, and a model that shares the parameters."""
    model = gpt2()
    sharing = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    before = Snapshot(sharing)
    wanted = loss(sharing)
    score_and_select(model, CONFIG, BATCHES)
    assert all(a is b for a, b in zip(model.parameters(), sharing.parameters(), strict=True))
    config = SpeftConfig(**{**CONFIG.to_dict(), "mode": "additive", "exclude_modules": [SQUARE]})
    sparsify(model, config, BATCHES)
    drawn(model)
    assert not torch.equal(loss(model), wanted)
    assert torch.equal(loss(sharing), wanted)
    shared = model.get_submodule(SQUARE).weight
    assert shared is sharing.get_submodule(SQUARE).weight
    assert not shared.requires_grad  # frozen like the rest
    desparsify(model, keep_delta=False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before.assert_untouched()
    # A parameter that its transpose is a mere view of is not written to, either.
    model = gpt2()
    weight = model.get_submodule(SQUARE).weight
    weight.data = weight.data.t().contiguous().t()
    values = weight.detach().clone()
    module = model.get_submodule(SQUARE)
    x = torch.randn(3, 16)
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    loss(model)
    assert torch.equal(weight, values)
    # Who has the module itself computes what the sparse layer does.
    torch.testing.assert_close(module(x), model.get_submodule(SQUARE)(x))


def test_hooks_on_a_weight_outlive_scoring():
    model, called = gpt2(), []
    model.get_submodule(SQUARE).weight.register_hook(lambda _: called.append(1))
    model.get_submodule(WIDE).weight.register_post_accumulate_grad_hook(lambda _: called.append(2))
    score_and_select(model, CONFIG, BATCHES)
    assert called == []
    loss(model).backward()
    assert sorted(called) == [1, 2]


@pytest.mark.parametrize("excluded", [True, False])
def test_a_layer_that_computes_in_a_way_of_its_own_is_passed_over(excluded):
    """As with the hooks of accelerate, which replace `forward`."""
    model = gpt2()
    module = model.get_submodule(SQUARE)
    module.forward = lambda x, forward=module.forward: 2 * forward(x)
    wanted = loss(model)
    settings = {**CONFIG.to_dict(), "exclude_modules": [SQUARE] if excluded else []}
    patterns, _ = score_and_select(model, SpeftConfig(**settings), BATCHES)
    other, _ = score_and_select(
        gpt2(), SpeftConfig(**{**settings, "exclude_modules": [SQUARE]}), BATCHES
    )
    assert patterns.keys() == other.keys()
    assert patterns != other  # scored with what the layer computes
    sparsify(model, SpeftConfig(**settings), BATCHES)
    torch.testing.assert_close(loss(model), wanted)
    assert model.get_submodule(SQUARE) is module
    named = SpeftConfig(**{**CONFIG.to_dict(), "target_modules": ["attn.c_proj"]})
    with pytest.raises(ConfigError, match="sparse layers already"):
        sparsify(model, named, BATCHES)
    desparsify(model)
    with pytest.raises(ConfigError, match="computes in a way of its own"):
        sparsify(model, named, BATCHES)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_layer_with_a_computed_parameter(part):
    model = gpt2()
    prune.l1_unstructured(model.get_submodule(SQUARE), part, 0.5)
    wanted = loss(model)
    named = SpeftConfig(**{**CONFIG.to_dict(), "target_modules": ["c_proj"]})
    with pytest.raises(ConfigError, match=f"{SQUARE}' .*{part} is computed"):
        sparsify(model, named, BATCHES)
    excluded = SpeftConfig(**{**CONFIG.to_dict(), "exclude_modules": [SQUARE]})
    for config in (excluded, CONFIG):  # of all linear layers it is left out
        sparsify(model, config, BATCHES)
        assert len(sparse_layers(model)) == 7
        torch.testing.assert_close(loss(model), wanted)
        desparsify(model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_callers_without_gradients(mode, tmp_path):
    model = gpt2()
    with mode():
        score_and_select(model, CONFIG, BATCHES)
        sparsify(model, CONFIG, BATCHES)
    drawn(model)
    save_adapter(model, tmp_path / "adapter")
    other = gpt2()
    with mode():
        load_adapter(other, tmp_path / "adapter")
    for each in (model, other):
        loss(each).backward()
        with mode():
            desparsify(each)
        each.requires_grad_(True)
        loss(each).backward()
    assert torch.equal(loss(model), loss(other))


def test_where_memory_runs_out_the_model_is_as_it_was(monkeypatch):
    model = gpt2()
    before = Snapshot(model)
    made = []

    def transposed(weight, transpose=conv1d._transposed):
        if len(made) == 3:
            made.append(None)
            raise MemoryError
        made.append(weight.shape)
        return transpose(weight)

    monkeypatch.setattr(conv1d, "_transposed", transposed)
    with pytest.raises(MemoryError):
        sparsify(model, CONFIG, BATCHES)
    assert len(made) == 4  # those before are given back as they were
    before.assert_untouched()
    del before
    made = [None] * 4
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    wanted = loss(model)
    made = [None]
    with pytest.raises(MemoryError):
        desparsify(model)
    assert {type(m) for m in model.modules() if is_conv1d(m) or isinstance(m, nn.Linear)} == {
        *(type(gpt2().get_submodule(SQUARE)), Conv1DLinear, nn.Linear)
    }
    torch.testing.assert_close(loss(model), wanted)
    desparsify(model)  # goes on
    assert sum(map(is_conv1d, model.modules())) == 8
    torch.testing.assert_close(loss(model), wanted)
    with pytest.raises(ConfigError, match="no sparse layers"):
        desparsify(model)


def test_hooks_and_shared_weights_are_refused():
    model = gpt2()
    model.get_submodule(SQUARE).register_forward_hook(lambda *_: None)
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=f"{SQUARE}' .*has hooks"):
        sparsify(model, CONFIG, BATCHES)
    before.assert_untouched()
    for shared in (lambda w: w, lambda w: nn.Parameter(w.data), lambda w: nn.Parameter(w.data.t())):
        model = gpt2()
        other = model.get_submodule("transformer.h.1.attn.c_proj")
        other.weight = shared(model.get_submodule(SQUARE).weight)
        before = Snapshot(model)
        for mode in ("resident", "additive"):
            config = SpeftConfig(
                **{**CONFIG.to_dict(), "target_modules": ["attn.c_proj"], "mode": mode}
            )
            with pytest.raises(ConfigError, match="a Conv1D, whose weight .* shares it with"):
                sparsify(model, config, BATCHES)
            before.assert_untouched()
        # The others train.
        config = SpeftConfig(**{**CONFIG.to_dict(), "exclude_modules": ["attn.c_proj"]})
        sparsify(model, config, BATCHES)
        assert len(sparse_layers(model)) == 6
        assert model.get_submodule("transformer.h.1.attn.c_proj") is other


def test_one_alone_is_no_linear_layer():
    alone = gpt2().get_submodule(SQUARE)
    pattern = SparsePattern((16, 16), torch.tensor([], dtype=torch.int32))
    for mode in ("resident", "additive"):
        with pytest.raises(ConfigError, match="a Conv1D holds the transposed weight: sparsify"):
            SparseDeltaLinear.from_linear(alone, pattern, mode)
    with pytest.raises(ConfigError):
        sparsify(alone, SpeftConfig(density=0.1, salience="magnitude"))


def test_state_dicts_have_the_weight_as_transformers_does(tmp_path):
    model = drawn(gpt2())
    plain = copy.deepcopy(model)
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    trained = loss(model).detach()
    names = set(plain.state_dict())
    state = model.state_dict()
    assert {n: t.shape for n, t in state.items() if n in names} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    # safetensors writes what is contiguous alone, as does the Trainer of any nn.Module.
    untied = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(untied, tmp_path / "state.safetensors")
    # transformers reads what it wrote; the rest it says it does not know.
    model.save_pretrained(tmp_path / "whole")
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loss(whole), trained)
    # Into another sparse model, which has another delta.
    other = gpt2(seed=1)
    sparsify(other, CONFIG, BATCHES)
    drawn(other)
    for assign in (False, True):
        saved = copy.deepcopy(state)
        other.load_state_dict(saved, assign=assign)
        assert torch.equal(loss(other), trained)
        assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    desparsify(other, keep_delta=False)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    # Of the plain model: what it lacks is said, and its weights are taken.
    result = model.load_state_dict(gpt2(seed=2).state_dict(), strict=False)
    assert not result.unexpected_keys
    desparsify(model, keep_delta=False)
    for name, tensor in gpt2(seed=2).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dicts_of_the_linear_layers_while_they_are_lent(assign, held):
    model, other = gpt2(), gpt2(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model.get_submodule(WIDE).weight if held else None
    with linear_for_conv1d(model, [SQUARE, WIDE]):
        assert isinstance(model.get_submodule(SQUARE), Conv1DLinear)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(loss(model), loss(gpt2()))
        assert all(t.is_contiguous() for t in model.state_dict().values())
        model.load_state_dict(other.state_dict(), assign=assign)
        linear = model.get_submodule(WIDE)
    found = model.get_submodule(WIDE).weight
    assert weight is None or weight is found
    assert linear.weight.data_ptr() == found.data_ptr()  # who kept it keeps no copy
    assert is_conv1d(model.get_submodule("transformer.h.0.mlp.c_fc"))
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_copies_and_pickles():
    model = gpt2()
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss(other), loss(model))
        desparsify(other)
        assert is_conv1d(other.get_submodule(WIDE))
        torch.testing.assert_close(loss(other), loss(model))


def test_an_adapter_is_for_either_kind_of_model(tmp_path):
    model = gpt2()
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    save_adapter(model, tmp_path / "adapter", config=CONFIG)
    for other in (gpt2(), with_linears(gpt2())):
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(loss(other), loss(model))
    other = gpt2(seed=1)
    before = Snapshot(other)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(other, tmp_path / "adapter")
    before.assert_untouched()
    wanted = fingerprint(other.get_submodule(SQUARE))
    with linear_for_conv1d(other, [SQUARE]):
        assert fingerprint(other.get_submodule(SQUARE)) == wanted
    sparsify(other, CONFIG, BATCHES)
    drawn(other)
    assert fingerprint(other.get_submodule(SQUARE)) == wanted


def test_an_adapter_of_fewer_layers_gives_the_others_back(tmp_path):
    few = SpeftConfig(**{**CONFIG.to_dict(), "target_modules": ["mlp.c_fc"]})
    model = gpt2()
    sparsify(model, few, BATCHES)
    drawn(model)
    save_adapter(model, tmp_path / "few")
    other = gpt2()
    sparsify(other, CONFIG, BATCHES)
    drawn(other)
    load_adapter(other, tmp_path / "few")
    assert is_conv1d(other.get_submodule(SQUARE))
    torch.testing.assert_close(loss(other), loss(model))


def test_a_weight_that_trains_densely_is_the_same_in_either_kind(tmp_path):
    """It is square: read the wrong way round, its shape would not tell."""
    few = SpeftConfig(
        **{**CONFIG.to_dict(), "target_modules": ["mlp.c_fc"], "modules_to_train": [SQUARE]}
    )
    trained = []
    for number, make in enumerate((gpt2, lambda: with_linears(gpt2()))):
        model = make()
        sparsify(model, few, BATCHES)
        drawn(model)
        optimizer = torch.optim.SGD([model.get_submodule(SQUARE).weight], lr=1.0)
        loss(model).backward()
        optimizer.step()
        save_adapter(model, tmp_path / str(number), config=few)
        trained.append(loss(model))
        biased = copy.deepcopy(model.get_submodule(SQUARE).weight)
    torch.testing.assert_close(*trained)
    assert biased.shape == (16, 16)
    whole, sparse = with_linears(gpt2()), gpt2()
    sparsify(sparse, CONFIG, BATCHES)
    for number in "01":
        for other in (gpt2(), whole, sparse):
            load_adapter(other, tmp_path / number)
            torch.testing.assert_close(loss(other), trained[0])
    assert is_conv1d(sparse.get_submodule(SQUARE))


def test_a_bias_that_trains_beside_the_entries(tmp_path):
    model = gpt2()
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    bias = model.get_submodule(WIDE).bias.requires_grad_(True)
    with torch.no_grad():
        bias.add_(1.0)
    save_adapter(model, tmp_path / "adapter")
    for other in (gpt2(), with_linears(gpt2())):
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(loss(other), loss(model))


@pytest.mark.parametrize("strategy", ["merge", "rigl"])
def test_a_mask_moves(strategy, tmp_path):
    model, linears = gpt2(), with_linears(gpt2())
    for each in (model, linears):
        sparsify(each, CONFIG, BATCHES)
        moving = MovingMask(each, CONFIG, strategy)
        drawn(each)
        move = moving.update(each, BATCHES, None, progress=0.5)
        assert move.moved
        moving.save(each, tmp_path / type(each.get_submodule(SQUARE)).__name__, overwrite=True)
    assert torch.equal(loss(model), loss(linears))
    other = gpt2()
    load_adapter(other, tmp_path / "SparseDeltaLinear")
    torch.testing.assert_close(loss(other), loss(model))
    desparsify(model)
    assert is_conv1d(model.get_submodule(SQUARE))


@pytest.mark.parametrize("salience", ["synflow", "fisher", "grasp", "snip"])
def test_every_score_is_that_of_the_linear_layers(salience):
    config = SpeftConfig(**{**CONFIG.to_dict(), "salience": salience})
    found, _ = score_and_select(gpt2(), config, BATCHES)
    wanted, _ = score_and_select(with_linears(gpt2()), config, BATCHES)
    assert found == wanted


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sums to learn, and a GPT-2 to learn them with."""
    folder = tmp_path_factory.mktemp("sums")
    rows = [{"prompt": f"{a} plus {b} =", "response": str(a + b)} for a in range(6) for b in (1, 2)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", rows[:4])
    pairs = [(row["prompt"], str(i % 2)) for i, row in enumerate(rows)]
    write_tsv(folder / "train.tsv", pairs)
    save_gpt2(folder / "model", [row["prompt"] for row in rows])
    return folder


def command(sums, output, *more, task="causal-lm"):
    kind = "jsonl" if task == "causal-lm" else "tsv"
    own = {"model": sums / "model", "train": sums / f"train.{kind}", "output": output}
    own |= {"eval": sums / f"{'eval' if kind == 'jsonl' else 'train'}.{kind}"}
    own |= {"task": task, "max-length": 16, "batch-size": 4, "epochs": 2}
    words = [str(part) for key, value in own.items() for part in (f"--{key}", value)]
    return main(["finetune", *words, *more])


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_the_command_trains_evaluates_and_merges(sums, task, tmp_path, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert command(sums, run, "--density", "0.1", task=task) == 0
    data = str(sums / ("eval.jsonl" if task == "causal-lm" else "train.tsv"))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", data]) == 0
    of_the_run = capsys.readouterr().out.splitlines()[-1]
    assert main(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(merged), "--data", data]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == of_the_run
    name = f"{'transformer.' if task == 'causal-lm' else ''}h.0.mlp.c_fc"
    kind = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModel
    assert kind.from_pretrained(merged).get_submodule(name).weight.shape == (32, 128)
    trained = load_trained(run)
    assert sum(map(is_conv1d, trained.model.modules())) == 8
    # The mask of that run trains anew.
    assert command(sums, tmp_path / "again", "--mask", str(run / "adapter"), task=task) == 0


def test_a_dry_run_knows_what_trains(sums, tmp_path, capsys):
    for more in ([], ["--lora-budget", "2"], ["--block-shape", "4x4"]):
        assert command(sums, tmp_path / "run", "--dry-run", *more) == 0
        told = capsys.readouterr().out
        assert "8 layers with 24,576 weights are adapted" in told
        assert "stay frozen" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "pissa", "shira", "supertuning", "full"])
def test_the_peers_train_it_too(sums, method, tmp_path, capsys):
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        assert command(sums, tmp_path / "run", "--method", method, "--lora-rank", "2") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(sums / "eval.jsonl")]) == 0
    if method != "full":
        merged = load_trained(tmp_path / "run").model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        name = "transformer.h.0.mlp.c_fc"
        assert is_conv1d(whole.get_submodule(name))
        assert whole.get_submodule(name).weight.shape == (32, 128)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['eval']['loss']:.4f}" in capsys.readouterr().out
    assert result["after"] != result["before"]
