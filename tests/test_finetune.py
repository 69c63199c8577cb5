import hashlib
import io
import json
import math
import re
import signal
import sys

import pytest
import torch
from rich.console import Console
from tiny_runs import DYNAMIC, METHODS, PEFT, Silent, lines, run, tensors, terminate
from tiny_text import save_bert, sentences, write_tsv
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from speft_kernels.adapter import load_adapter
from speft_kernels.errors import ConfigError, SalienceError, SpeftError
from speft_kernels.finetune import load_classifier, load_tokenizer
from speft_kernels.finetune import loop as loop_module
from speft_kernels.finetune.batches import epoch_order
from speft_kernels.finetune.data import read_examples
from speft_kernels.finetune.display import Display
from speft_kernels.finetune.loop import TrainingError
from speft_kernels.finetune.models import MeanPoolClassifier
from speft_kernels.finetune.signals import Interrupted
from speft_kernels.finetune.tasks import Classification
from speft_kernels.model import sparse_layers


def accuracy_of(model, place):
    tokenizer = load_tokenizer(str(place / "model"))
    examples = read_examples(str(place / "eval.tsv"), "classification")
    task = Classification(tokenizer, {"bad": 0, "good": 1}, 128)
    batch = task.collate(task.encode(examples))
    model.eval()
    with torch.no_grad():
        _, predicted = task.loss(model, batch.inputs)
    return (predicted == batch.inputs["labels"]).float().mean().item()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's call
@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_writes_its_folder_and_can_be_loaded_again(place, tmp_path, method):
    output = tmp_path / "run"
    result = run(place, output, method, test=str(place / "eval.tsv"), head_warmup_steps=2)

    assert result["after"] >= 0.8 > result["before"]
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter",
        "config.json",
        "metrics.jsonl",
        "result.json",
    ]
    assert json.loads((output / "result.json").read_text()) == result
    assert result["test"]["accuracy"] == result["after"] == result["eval"]["accuracy"]
    own = "speft" if method in DYNAMIC else method
    assert (result["method"], result["metric"], result["seed"]) == (own, "accuracy", 0)
    assert result["majority"] == 0.5
    assert result["steps"] == 36
    assert result["trainable_parameters"] == (
        result["trainable_parameters_without_head"] + result["head_parameters"]
    )
    assert result["head_parameters"] == 2 * 32 + 2
    assert result["step_ms_median"] > 0
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 2**20
    assert result["train_seconds"] > 0
    assert (result["salience_seconds"] > 0) == (own == "speft")
    assert (
        result["versions"]["torch"] == torch.__version__.partition("+")[0]
        or "+" in (result["versions"]["torch"])
    )
    evaluations = [line["eval"]["accuracy"] for line in lines(output) if "eval" in line]
    assert len(evaluations) == 3
    assert max(evaluations) == result["after"]

    if method == "full":
        model = load_classifier(str(output / "adapter"), ("bad", "good"))
        assert isinstance(model, MeanPoolClassifier)
    else:
        model = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
    if method in PEFT:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, output / "adapter")
    elif method != "full":
        load_adapter(model, output / "adapter")
    assert accuracy_of(model, place) == pytest.approx(result["after"])


def test_the_budget_is_counted_without_the_head(place, tmp_path):
    sparse = run(place, tmp_path / "a", max_steps=1)
    lora = run(place, tmp_path / "b", "lora", max_steps=1)
    elements = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert sparse["trainable_parameters_without_head"] == 2 * (4 * 51 + 2 * 77)
    assert sparse["density"] == sparse["trainable_parameters_without_head"] / elements
    assert lora["trainable_parameters_without_head"] == 2 * 2 * (4 * 64 + 2 * 80)
    assert sparse["head_parameters"] == lora["head_parameters"]
    assert run(place, tmp_path / "c", "head", max_steps=1)["density"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(place, tmp_path, method):
    more = {"eval_every": 5, "save_every": 100, "grad_accumulation": 2, "epochs": 2}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    expected = run(place, straight, method, **more)
    with pytest.raises(Interrupted) as caught:
        run(place, stopped, method, display=Silent(7, terminate), **more)
    assert caught.value.signum == signal.SIGTERM
    assert caught.value.folder == stopped
    assert not (stopped / "result.json").exists()
    result = run(place, stopped, method, resume=True, **more)

    for key in ("before", "after", "eval", "best_step", "steps", "trainable_parameters", "density"):
        assert result[key] == expected[key], key
    assert [line.get("loss") for line in lines(stopped)] == [
        line.get("loss") for line in lines(straight)
    ]
    ours, theirs = tensors(stopped), tensors(straight)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert result.get("dynamic", {}).get("steps") == ([4, 8] if method in DYNAMIC else None)


def test_a_killed_run_resumes_from_its_last_checkpoint(place, tmp_path):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    more = {"eval_every": 4, "save_every": 6, "epochs": 1}
    expected = run(place, straight, **more)
    with pytest.raises(Killed):
        run(place, killed, display=Silent(9, kill), **more)
    assert lines(killed)[-1]["step"] == 9
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    result = run(place, killed, resume=True, **more)
    assert result["eval"] == expected["eval"]
    assert [line["step"] for line in lines(killed)] == [line["step"] for line in lines(straight)]


def test_a_signal_before_training_leaves_nothing(place, tmp_path, monkeypatch):
    display = Silent()
    monkeypatch.setattr(display, "note", lambda text: terminate())
    with pytest.raises(Interrupted) as caught:
        run(place, tmp_path / "run", display=display)
    assert caught.value.folder is None
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resuming_needs_the_same_settings_and_data(place, tmp_path):
    output, data = tmp_path / "run", tmp_path / "train.tsv"
    data.write_bytes((place / "train.tsv").read_bytes())
    with pytest.raises(Interrupted):
        run(place, output, display=Silent(2, terminate), train=str(data))
    with pytest.raises(ConfigError, match="lr = 0.02 and cannot go on with 0.03"):
        run(place, output, resume=True, train=str(data), lr=0.03)
    data.write_text(data.read_text() + "a new row\tgood\n")
    with pytest.raises(ConfigError, match="the data, the model or its tokenizer has changed"):
        run(place, output, resume=True, train=str(data))
    (output / "checkpoint" / "state.pt").write_bytes(b"damaged")
    data.write_bytes((place / "train.tsv").read_bytes())
    with pytest.raises(ConfigError, match="checkpoint is damaged"):
        run(place, output, resume=True, train=str(data))


def test_output_folders_are_protected(place, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(ConfigError, match="no run to resume"):
        run(place, output, resume=True)
    first = run(place, output, max_steps=2)
    with pytest.raises(ConfigError, match=r"exists already.*--overwrite"):
        run(place, output, max_steps=2)
    with pytest.raises(ConfigError, match="is finished"):
        run(place, output, max_steps=2, resume=True)
    assert json.loads((output / "result.json").read_text()) == first
    run(place, output, max_steps=1, overwrite=True)
    assert json.loads((output / "result.json").read_text())["steps"] == 1
    precious = tmp_path / "home" / "letter.txt"
    precious.parent.mkdir()
    precious.write_text("dear")
    with pytest.raises(ConfigError, match="not a run of this command"):
        run(place, precious.parent, overwrite=True)
    with pytest.raises(ConfigError, match="cannot be created: Not a directory"):
        run(place, precious / "run")
    assert precious.read_text() == "dear"


@pytest.mark.parametrize("method", ["speft", "lora", "full"])
def test_overwrite_deletes_nothing_but_a_run(place, tmp_path, method):
    output = tmp_path / "run"
    run(place, output, method, max_steps=1)
    (output / "report.html").write_text("of a run")
    for folder in (output, output / "adapter"):
        notes = folder / "notes.txt"
        notes.write_text("dear")
        with pytest.raises(ConfigError, match=rf"{folder} holds .* \('notes.txt'\)"):
            run(place, output, overwrite=True)
        assert notes.read_text() == "dear"
        notes.unlink()
    with pytest.raises(ConfigError, match="model .* lies in the output"):
        run(place, output, overwrite=True, model=str(output / "adapter"))
    run(place, output, max_steps=1, overwrite=True)
    assert (output / "adapter" / "adapter.safetensors").exists()
    assert not (output / "report.html").exists()


def test_accumulation_changes_the_memory_and_not_the_steps(tmp_path, monkeypatch):
    rows = sentences(48, seed=1)
    write_tsv(tmp_path / "train.tsv", rows)
    write_tsv(tmp_path / "eval.tsv", sentences(12, seed=2))
    save_bert(tmp_path / "model", [text for text, _ in rows], dropout=0.0)
    batches = epoch_order([1] * 48, 16, 0, 0)
    monkeypatch.setattr(loop_module, "epoch_order", lambda *_: batches)
    run(tmp_path, tmp_path / "whole", batch_size=16, epochs=1)
    # Pieces of unequal size: the mean must be over examples, not over batches.
    pieces = [piece for b in batches for piece in (b[:1], b[1:4], b[4:9], b[9:])]
    monkeypatch.setattr(loop_module, "epoch_order", lambda *_: pieces)
    monkeypatch.setattr(loop_module, "steps_per_epoch", lambda *_: 3)
    run(tmp_path, tmp_path / "pieces", batch_size=4, grad_accumulation=4, epochs=1)
    whole, parts = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
        for name in ("whole", "pieces")
    )
    assert len(whole) == 3
    # Only the order of the sums differs. Weights by batch instead of by example are 1e-2 off.
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_best_model_is_the_one_that_is_kept(place, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.9, 0.2])
    seen = []

    def scripted(model, *rest):
        seen.append(model.state_dict()["classifier.weight"].clone())
        score = next(scores)
        return {"accuracy": score, "f1": 0.0, "matthews": 0.0, "loss": 1.0}, []

    monkeypatch.setattr(loop_module, "evaluate", scripted)
    output = tmp_path / "run"
    result = run(place, output, "head", max_steps=10, eval_every=2)
    assert result["after"] == 0.9
    assert result["best_step"] == 6  # a tie keeps the earlier one
    assert torch.equal(tensors(output)["dense.classifier.weight"], seen[2])
    assert not torch.equal(seen[2], seen[4])


def test_a_lower_loss_is_the_better_one_and_metrics_can_be_chosen(place, tmp_path):
    result = run(place, tmp_path / "run", metric="matthews")
    assert result["metric"] == "matthews"
    assert result["after"] == result["eval"]["matthews"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(place, tmp_path):
    first, again, other = (
        (run(place, tmp_path / name, max_steps=5, seed=seed), lines(tmp_path / name))[1]
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert [x.get("loss") for x in first] == [x.get("loss") for x in again]
    assert [x.get("loss") for x in first] != [x.get("loss") for x in other]


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_the_loss_curve_is_that_of_the_reference(place, tmp_path, monkeypatch, mode):
    run(place, tmp_path / "kernels", mode=mode, epochs=5, max_steps=50)
    monkeypatch.setenv("SPEFT_BACKEND", "reference")
    run(place, tmp_path / "reference", mode=mode, epochs=5, max_steps=50)
    ours = [x["loss"] for x in lines(tmp_path / "kernels") if "loss" in x]
    theirs = [x["loss"] for x in lines(tmp_path / "reference") if "loss" in x]
    assert len(ours) == 50
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < 0.8 * ours[0]


def test_loss_that_is_no_number_stops_the_run(place, tmp_path):
    with pytest.raises(TrainingError, match="at step 2; lower --lr"):
        run(place, tmp_path / "run", lr=9e36, warmup_ratio=0, clip=0, head_warmup_steps=0)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_head_that_diverges_before_scoring_leaves_nothing(place, tmp_path):
    with pytest.raises(
        SalienceError, match="head warm-up step 2.*lower the head's learning rate, 9e.36"
    ):
        run(place, tmp_path / "run", head_lr=9e36)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_weight_is_found_and_nothing_is_written(place, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(place / "model")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    model.bert.save_pretrained(tmp_path / "model")
    load_tokenizer(str(place / "model")).save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense\.weight' holds NaN"):
        run(place, tmp_path / "run", model=str(tmp_path / "model"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_loss_that_is_nan_while_scoring_leaves_nothing(place, tmp_path, monkeypatch):
    class Broken(Classification):
        def loss(self, model, inputs):
            loss, predicted = super().loss(model, inputs)
            return (loss * math.nan, predicted) if loss.requires_grad else (loss, predicted)

    monkeypatch.setattr("speft_kernels.finetune.inputs.Classification", Broken)
    with pytest.raises(SalienceError, match="nan"):
        run(place, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_is_nan_before_training_leaves_nothing(place, tmp_path, monkeypatch):
    class Broken(Classification):
        def metrics(self, *scored):
            return {**super().metrics(*scored), "loss": math.nan}

    monkeypatch.setattr("speft_kernels.finetune.inputs.Classification", Broken)
    with pytest.raises(TrainingError, match="loss is nan before training"):
        run(place, tmp_path / "run", "head")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 1.0}, "density = 1.0 must be less than 1"),
        ({"density": 0}, "density = 0.0 must be greater than 0"),
        ({"lr": 1e37}, r"lr = 1e\+37 must be less than 1e\+37"),
        ({"head_lr": math.inf}, "head_lr = inf"),
        ({"scope": "local"}, "scope"),
        ({"task": "classify"}, "Did you mean 'classification'"),
        ({"block_shape": [5, 5]}, "do not tile layer"),
        ({"block_shape": "16"}, "is not like 16x16"),
        ({"epochs": 2.5}, "epochs = 2.5 is not a whole number"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": True}, "not a whole number"),
        ({"lr": -1}, "greater than 0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"scoring_examples": 4, "scoring_batches": 8}, "a batch needs one example"),
        ({"dtype": "float16"}, "CUDA GPUs only"),
        ({"eval": ""}, "--eval is missing"),
        ({"learning_rate": 1e-3}, "setting 'learning_rate' is unknown"),
        ({"scheduler": "linaer"}, "Did you mean 'linear'"),
        ({"dynamic": "rigl"}, "the mask would never move"),
    ],
)
def test_wrong_settings_are_named_and_leave_nothing(place, tmp_path, setting, message):
    if setting.get("dtype") == "float16" and torch.cuda.is_available():
        pytest.skip("float16 is refused on a CPU only")
    with pytest.raises(SpeftError, match=message):
        run(place, tmp_path / "run", **setting)
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_head_trains_too(place, tmp_path):
    result = run(place, tmp_path / "run", pooling="model", salience="gradient")
    assert result["after"] >= 0.8
    model = load_classifier(str(place / "model"), ("bad", "good"), pooling="model")
    assert isinstance(model, BertForSequenceClassification)
    load_adapter(model, tmp_path / "run" / "adapter")
    assert any("pooler" in name for name in sparse_layers(model))
    assert accuracy_of(model, place) == pytest.approx(result["after"])


def test_a_score_of_the_users_trains_what_its_formula_does_and_its_file_is_recorded(
    place, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code = b"def score(w, g):\n    return (w * g).abs()\n"
    (tmp_path / "own_snip.py").write_bytes(code)
    own = run(place, tmp_path / "own", salience="own_snip:score")
    ours = run(place, tmp_path / "ours", salience="snip")
    assert own["after"] == ours["after"]
    for name, tensor in tensors(tmp_path / "ours").items():
        assert torch.equal(tensors(tmp_path / "own")[name], tensor)
    digits = hashlib.sha256(code).hexdigest()[:12]
    assert own["inputs"] == f"{ours['inputs']} salience={digits}"
    sys.modules.pop("own_snip", None)


def test_weight_decay_spares_the_sparse_values(place, tmp_path, monkeypatch):
    groups = []
    original = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda params, **kw: groups.extend(params) or original(params, **kw)
    )
    run(place, tmp_path / "run", max_steps=1, weight_decay=0.1, head_lr=0.5, head_warmup_steps=0)
    described = {
        (group["lr"], group["weight_decay"]): sum(p.numel() for p in group["params"])
        for group in groups
    }
    assert described == {(2e-2, 0.0): 2 * (4 * 51 + 2 * 77), (0.5, 0.1): 64, (0.5, 0.0): 2}


def test_a_fused_step_reaches_the_weights(place, tmp_path, monkeypatch):
    """Fused optimizers write parameters without raising their version."""
    seen = []

    class Spy(loop_module.Loop):
        def _step(self, window):
            super()._step(window)
            layer = next(iter(sparse_layers(self.model).values()))
            layer(torch.zeros(1, layer.in_features))
            seen.append(layer.weight.detach().clone())
            assert all(group["fused"] for group in self.optimizer.param_groups)

    monkeypatch.setattr("speft_kernels.finetune.run.Loop", Spy)
    run(place, tmp_path / "run", max_steps=3)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(place, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    run(place, tmp_path / "run", display=Display(console), max_steps=4)
    text = screen.getvalue()
    assert "training" in text
    assert "4/4" in text
    assert re.search(r"loss \d\.\d{4}  [0-9,]+ tokens/s", text)
    assert "step 4: eval accuracy" in text


def test_a_signal_while_testing_is_resumable_too(place, tmp_path, monkeypatch):
    output, test = tmp_path / "run", str(place / "eval.tsv")
    original = loop_module.Loop.evaluate

    def stopped(self, encoded):
        if encoded is not self.held_out:
            terminate()
        return original(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "evaluate", stopped)
        with pytest.raises(Interrupted) as caught:
            run(place, output, max_steps=3, test=test)
    assert caught.value.folder == output
    result = run(place, output, max_steps=3, test=test, resume=True)
    assert result["test"]["accuracy"] == result["after"]


def test_bfloat16_computes_in_bfloat16_and_keeps_the_weights(place, tmp_path, monkeypatch):
    dtypes = set()

    class Spy(Classification):
        def loss(self, model, inputs):
            dtypes.add(model.classifier(torch.zeros(1, 32)).dtype)
            dtypes.add(model.classifier.weight.dtype)
            return super().loss(model, inputs)

    monkeypatch.setattr("speft_kernels.finetune.inputs.Classification", Spy)
    result = run(place, tmp_path / "run", dtype="bfloat16", epochs=4)
    assert dtypes == {torch.bfloat16, torch.float32}
    assert result["after"] >= 0.8
