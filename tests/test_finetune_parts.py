import io
import json
import os
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tiny_text import save_bert
from torch import nn

from speft_kernels.errors import ConfigError
from speft_kernels.files import replaced, write_json
from speft_kernels.finetune import load_classifier
from speft_kernels.finetune.batches import Batch, epoch_order, length_order
from speft_kernels.finetune.config import RunConfig, load_yaml
from speft_kernels.finetune.display import Display, duration
from speft_kernels.finetune.inputs import ScoringBatches
from speft_kernels.finetune.methods import mean_loss
from speft_kernels.finetune.models import pooling_of
from speft_kernels.finetune.signals import StopSignals
from speft_kernels.finetune.tasks import classification_scores


@pytest.fixture
def model_folder(tmp_path):
    return save_bert(tmp_path / "model", ["some words of a text"])


def test_yaml_values_are_read_as_the_settings_types(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "lr: 1e-3\nbatch-size: '16'\nblock_shape: 4x8\ntarget_modules: [query]\nclip: 1\n"
    )
    assert load_yaml(path) == {
        "lr": 1e-3,
        "batch_size": 16,
        "block_shape": (4, 8),
        "target_modules": ("query",),
        "clip": 1.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1", "key 'learning_rate' is unknown"),
        ("densty: 0.1", "Did you mean 'density'"),
        ("- a", "must hold keys"),
        ("a: [", "cannot be read as YAML"),
        ("epochs: many", "epochs = 'many' is not a whole number"),
    ],
)
def test_broken_yaml_is_refused(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_yaml(path)


def test_pooling_follows_the_models_folder(model_folder, tmp_path):
    folder = model_folder
    assert pooling_of(str(folder)) == "model"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert pooling_of(str(folder)) == "mean"
    model = load_classifier(str(folder), ("a", "b", "c"))
    model.save_pretrained(tmp_path / "saved")
    assert pooling_of(str(tmp_path / "saved")) == "mean"
    again = load_classifier(str(tmp_path / "saved"), ("a", "b", "c"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_mean_pooling_does_not_see_the_padding(model_folder):
    model = load_classifier(str(model_folder), ("a", "b"), pooling="mean").eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    padded = torch.tensor([[2, 5, 6, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model(padded, mask).logits)


def test_every_example_occurs_once_an_epoch_and_lengths_are_alike():
    lengths = [(7 * i) % 50 + 1 for i in range(500)]
    batches = epoch_order(lengths, 8, seed=1, epoch=2)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert batches == epoch_order(lengths, 8, seed=1, epoch=2)
    assert batches != epoch_order(lengths, 8, seed=1, epoch=3)
    assert batches != epoch_order(lengths, 8, seed=2, epoch=2)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert sorted(i for batch in length_order(lengths, 8) for i in batch) == list(range(500))


def test_scores_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3):
        true, predicted = torch.randint(classes, (2, 200), generator=generator).tolist()
        scores = classification_scores(predicted, true, classes)
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
        if classes == 2:
            assert scores["f1"] == pytest.approx(metrics.f1_score(true, predicted))
            expected = metrics.matthews_corrcoef(true, predicted)
            assert scores["matthews"] == pytest.approx(expected)
    assert classification_scores([0, 0], [0, 1], 2) == {"accuracy": 0.5, "f1": 0, "matthews": 0}


@pytest.mark.parametrize(
    ("examples", "sizes"),
    [(8, [2] * 4), (9, [3, 2, 2, 2]), (4, [1] * 4), (5, [3, 2]), (7, [3, 2, 2]), (3, [1] * 3)],
)
def test_scoring_batches_differ_by_less_than_a_factor_of_two(examples, sizes):
    class Rows:
        def collate(self, rows):
            return Batch({"rows": rows}, len(rows), 0)

    rows = list(range(examples))
    config = RunConfig(train="-", output="-", scoring_examples=100, scoring_batches=4)
    batches = [b["rows"] for b in ScoringBatches(Rows(), rows, config, StopSignals(), 0)]
    assert [len(batch) for batch in batches] == sizes
    assert sorted(row for batch in batches for row in batch) == rows


def test_a_run_in_float16_scores_where_small_gradients_are_not_zero():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    inputs = {"x": torch.randn(16, 32)}

    class Task:
        def loss(self, model, inputs):
            return 1e-6 * model(inputs["x"]).float().square().sum(), None

        def count(self, inputs):
            return len(inputs["x"])

    class Half:  # of an accelerator, what a run in float16 on a GPU has
        mixed_precision, device = "fp16", torch.device("cpu")

        def autocast(self):
            return torch.autocast("cpu", torch.float16)

    def zeros(loss):
        model.zero_grad()
        loss.backward()
        gradients = [layer.weight.grad for layer in model]
        return sum(int((g == 0).sum()) for g in gradients)

    with Half().autocast():
        total, _ = Task().loss(model, inputs)
    assert zeros(total / 16) > 1000  # or this test would show nothing
    assert zeros(mean_loss(Task(), Half())(model, inputs)) == 0


def test_elsewhere_a_long_run_gets_some_lines():
    screen = io.StringIO()
    display = Display(Console(file=screen, force_terminal=False))
    display.start(1000, 0)
    for step in range(1, 1001):
        display.step(step, 0.5, 1234.0)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 20
    assert re.fullmatch(r"step 50/1000  loss 0\.5000  1,234 tokens/s  0:\d\d left", lines[0])


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (61.6, "1:02"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_files_mode_is_the_usual_one_whoever_writes_it(tmp_path, monkeypatch):
    """And the umask, which all threads share, is left alone meanwhile."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_json(tmp_path / "a", {})
            with replaced(tmp_path / "b") as temporary:
                save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640, 0o640]


def write_half(path):
    with replaced(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(OSError, match="full"):
        write_half(path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 8e-3),
        ({"salience": "random"}, 8e-3),
        ({"salience": "gradient", "selection": "sample"}, 8e-3),
        ({"salience": "snip"}, 2e-3),
        ({"selection": "top"}, 2e-3),
        ({"task": "causal-lm"}, 8e-3),
        ({"task": "causal-lm", "salience": "gradient"}, 2e-3),
        ({"task": "causal-lm", "method": "lora"}, 2e-3),
        ({"method": "lora"}, 2e-3),
        ({"method": "full"}, 5e-5),
        ({"lr": 1e-4}, 1e-4),
    ],
)
def test_the_learning_rate_that_is_not_given_goes_with_the_mask(settings, rate):
    config = RunConfig.from_dict({"train": "x", "output": "y", **settings})
    assert config.learning_rate == config.head_learning_rate == rate


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 50),
        ({"method": "lora"}, 50),
        ({"method": "head"}, 0),
        ({"task": "causal-lm"}, 0),
        ({"head_warmup_steps": 7, "method": "head"}, 7),
        ({"head_warmup_steps": 0}, 0),
    ],
)
def test_a_head_trains_alone_first_where_something_else_trains_too(settings, steps):
    config = RunConfig.from_dict({"train": "x", "output": "y", **settings})
    assert config.head_warmup_steps == config.to_dict()["head_warmup_steps"] == steps


def test_settings_hold_the_salience_and_selection_that_were_left_to_us():
    settings = RunConfig(train="x", output="y").to_dict()
    assert (settings["salience"], settings["selection"]) == ("snip", "sample")
    assert RunConfig.from_dict(settings).to_dict() == settings
    assert RunConfig(train="x", output="y", salience="force").speft().selection == "top"
