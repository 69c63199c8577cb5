"""GPT-2's `Conv1D`, which holds the transposed weight: trained as a linear layer, and back."""

import copy
import json
import pickle
import warnings
import weakref

import pytest
import torch
from tiny_models import Snapshot, gpt2, token_batches
from tiny_text import save_gpt2, write_jsonl, write_tsv
from torch import nn

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
    assert all(p.is_contiguous() for p in model.parameters())


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


def test_a_head_of_conv1d_keeps_what_its_warm_up_taught_it():
    for held in (False, True):
        model = gpt2()
        weight = model.get_submodule(WIDE).weight if held else None
        before = model.get_submodule(WIDE).weight.detach().clone()
        config = SpeftConfig(
            **{**CONFIG.to_dict(), "modules_to_train": [WIDE], "head_warmup_steps": 2}
        )
        sparsify(model, config, BATCHES)
        found = model.get_submodule(WIDE).weight
        assert found.shape == before.shape
        assert not torch.equal(found, before)
        assert weight is None or weight is found
        assert found.requires_grad


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
            with pytest.raises(ConfigError, match="shared, and a Conv1D holds it transposed"):
                sparsify(model, config, BATCHES)
            before.assert_untouched()
        # The others train.
        sparsify(model, CONFIG, BATCHES)
        assert len(sparse_layers(model)) == 6
        assert is_conv1d(other)


def test_one_alone_is_no_linear_layer():
    alone = gpt2().get_submodule(SQUARE)
    pattern = SparsePattern((16, 16), torch.tensor([], dtype=torch.int32))
    for mode in ("resident", "additive"):
        with pytest.raises(ConfigError, match="a Conv1D has no in_features"):
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
    assert state[f"{WIDE}.weight"].data_ptr() == model.get_submodule(WIDE).weight.data_ptr()
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


def test_state_dicts_of_the_linear_layers_while_they_are_lent():
    model, other = gpt2(), gpt2(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with linear_for_conv1d(model):
        assert isinstance(model.get_submodule(SQUARE), Conv1DLinear)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(loss(model), loss(gpt2()))
        model.load_state_dict(other.state_dict())
        linear = model.get_submodule(WIDE)
    assert linear.weight.is_meta  # who kept it keeps no copy
    assert linear.weight.shape == (64, 16)
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
    with linear_for_conv1d(other):
        linear = other.get_submodule(SQUARE)
        wanted = fingerprint(linear)
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


def test_an_adapter_of_the_whole_weight_does_not_go_into_a_sparse_layer(tmp_path):
    """It would be read the wrong way round."""
    model = gpt2()
    few = SpeftConfig(
        **{**CONFIG.to_dict(), "target_modules": ["mlp.c_fc"], "modules_to_train": [SQUARE]}
    )
    sparsify(model, few, BATCHES)
    drawn(model)
    with torch.no_grad():
        model.get_submodule(SQUARE).weight.add_(1.0)
    save_adapter(model, tmp_path / "dense")
    other = gpt2()
    load_adapter(other, tmp_path / "dense")
    assert torch.equal(loss(other), loss(model))
    other = gpt2()
    sparsify(other, CONFIG, BATCHES)
    wanted = loss(other)
    with pytest.raises(AdapterError, match=f"weight of '{SQUARE}', a Conv1D .*desparsify"):
        load_adapter(other, tmp_path / "dense")
    assert torch.equal(loss(other), wanted)
    desparsify(other)
    load_adapter(other, tmp_path / "dense")
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


@pytest.mark.parametrize("method", ["lora", "pissa", "shira", "supertuning", "full"])
def test_the_peers_train_it_too(sums, method, tmp_path, capsys):
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        assert command(sums, tmp_path / "run", "--method", method, "--lora-rank", "2") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(sums / "eval.jsonl")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['eval']['loss']:.4f}" in capsys.readouterr().out
    assert result["after"] != result["before"]
