"""The order of the labels: which one F1 is of, and what it means for a head that is kept."""

import json

import pytest
import torch
from tiny_runs import Silent, run, settings
from tiny_text import sentences, write_tsv
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from speft_kernels.cli import main
from speft_kernels.errors import AdapterError, ConfigError
from speft_kernels.finetune import RunConfig, load_classifier, load_trained
from speft_kernels.finetune.data import label_ids, read_examples, split_off
from speft_kernels.finetune.dry_run import dry_run
from speft_kernels.finetune.models import labels_of_head
from speft_kernels.finetune.result import describe
from speft_kernels.finetune.tasks import classification_scores, positive_label


def hub(monkeypatch, rows, names):
    """Lets every dataset of the hub be these rows, with labels that are numbers of `names`."""
    datasets = pytest.importorskip("datasets")
    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    table = {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]}
    loaded = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **settings: loaded)


def test_labels_keep_the_order_of_their_dataset(monkeypatch, tmp_path):
    """GLUE's MRPC: its F1 is of "equivalent", which has the number 1 and sorts first."""
    names = ["not_equivalent", "equivalent", "unused"]
    true, predicted = [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 1, 0]
    hub(monkeypatch, [("a", label) for label in true], names)
    examples = read_examples("nyu-mll/glue@mrpc:train", "classification")
    numbers = label_ids(examples)
    assert numbers == {"not_equivalent": 0, "equivalent": 1}
    assert label_ids(split_off(examples, 0.5)[0]) == numbers
    found = [numbers[names[label]] for label in predicted]
    scores = classification_scores(found, [numbers[row.label] for row in examples.rows], 2)
    assert scores["f1"] == pytest.approx(10 / 12)
    rows = [(row.texts[0], row.label) for row in examples.rows]
    file = read_examples(str(write_tsv(tmp_path / "a.tsv", rows)), "classification")
    assert label_ids(file) == {"equivalent": 0, "not_equivalent": 1}
    # A run does not go on, nor a study reuse one, where the classes have other numbers.
    assert file.fingerprint() != examples.fingerprint()


def test_labels_beside_those_of_a_dataset_come_last(monkeypatch):
    hub(monkeypatch, [("a", label) for label in (1, 0, -1)], ["z", "a"])
    assert list(label_ids(read_examples("some/set", "classification"))) == ["z", "a", "-1"]


@pytest.mark.parametrize("positive", [0, 1])
def test_f1_is_of_the_positive_label(positive):
    metrics = pytest.importorskip("sklearn.metrics")
    true, predicted = [1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 1, 1]
    expected = metrics.f1_score(true, predicted, pos_label=positive)
    scores = classification_scores(predicted, true, 2, positive)
    assert scores["f1"] == pytest.approx(expected)
    assert scores["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, predicted))


def test_the_positive_label_is_one_of_two():
    assert positive_label(None, ("b", "a")) == "a"
    assert positive_label("b", ("b", "a")) == "b"
    assert positive_label(None, ("a", "b", "c")) is None
    with pytest.raises(ConfigError, match="'godo' does not occur .*'good'.* Did you mean 'good'"):
        positive_label("godo", ("bad", "good"))
    with pytest.raises(ConfigError, match="is for two labels and the training data has 3"):
        positive_label("a", ("a", "b", "c"))
    with pytest.raises(ConfigError, match="causal-lm has none"):
        RunConfig(train="x", output="y", task="causal-lm", positive_label="a")
    # YAML makes a number of it.
    assert RunConfig(train="x", output="y", positive_label=1).positive_name == "1"


@pytest.mark.parametrize("method", ["speft", "lora"])
def test_a_run_measures_and_remembers_its_positive_label(place, tmp_path, capsys, method):
    data, output = tmp_path / "test.tsv", tmp_path / "run"
    write_tsv(data, sentences(30, seed=3)[:29])  # F1 of both labels differ
    others = {"metric": "f1", "positive_label": "bad", "max_steps": 3, "test": str(data)}
    result = run(place, output, method, **others)
    assert result["positive_label"] == "bad"
    assert describe(result, str(output)).startswith("f1 of 'bad': ")
    trained = load_trained(output)
    assert (trained.labels, trained.positive_label) == (("bad", "good"), "bad")
    assert main(["evaluate", str(output), "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert f"f1:         {result['test']['f1']:.4f}" in said
    assert "f1 is of the label 'bad'" in said
    config = RunConfig.from_dict(settings(place, tmp_path / "other", method, **others))
    assert "f1 is of the label 'bad'" in dry_run(config)
    with pytest.raises(ConfigError, match="'god' does not occur"):
        run(place, tmp_path / "other", method, positive_label="god")


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, 0.5),
        ({"metric": "matthews"}, 0.0),
        ({"metric": "f1"}, 2 / 3),  # half of what is called good, and all that is
        ({"metric": "f1", "positive_label": "bad"}, 0.0),
    ],
)
def test_the_most_frequent_label_is_scored_by_the_runs_metric(place, tmp_path, others, expected):
    more_good = str(write_tsv(tmp_path / "train.tsv", sentences(95, seed=1)))
    result = run(place, tmp_path / "run", "head", train=more_good, max_steps=1, **others)
    assert result["majority"] == pytest.approx(expected)


def test_an_adapter_without_a_positive_label_has_the_second(place, tmp_path):
    run(place, tmp_path / "run", "lora", max_steps=1)
    path = tmp_path / "run" / "adapter" / "speft.json"
    about = json.loads(path.read_text())
    assert about.pop("positive_label") == "good"
    path.write_text(json.dumps(about))
    assert load_trained(tmp_path / "run").positive_label == "good"
    for wrong in ("so-so", ["good"], 1):
        path.write_text(json.dumps({**about, "positive_label": wrong}))
        with pytest.raises(AdapterError, match="positive_label must be null or one of two"):
            load_trained(tmp_path / "run")


# A head that the model's folder holds


def classifier(place, folder, names=None):
    """A whole classifier with outputs of these names, and the place's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    named = {} if names is None else {"id2label": dict(enumerate(names))}
    config = BertConfig.from_pretrained(place / "model", **named)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("names", "labels", "expected", "kept"),
    [
        (("positive", "negative"), ("negative", "positive"), ("positive", "negative"), True),
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), ("positive", "negative"), True),
        (("negative", "positive"), ("negative", "positive"), ("negative", "positive"), True),
        (None, ("negative", "positive"), ("negative", "positive"), True),
        (("negative", "positive"), ("0", "1"), ("0", "1"), True),
        (("bad", "good"), ("negative", "positive"), ("negative", "positive"), False),
        (("a", "b", "c"), ("a", "b"), ("a", "b"), False),
    ],
)
def test_a_head_that_is_kept_gives_its_order_to_the_labels(
    place, tmp_path, names, labels, expected, kept
):
    saved = classifier(place, tmp_path / "model", names)
    ordered, note = labels_of_head(str(tmp_path / "model"), labels)
    assert ordered == expected
    assert (note == "") == kept
    assert kept or ("its classification head is for the labels ['" in note)
    torch.manual_seed(5)
    loaded = load_classifier(str(tmp_path / "model"), ordered, new_head=not kept)
    assert [loaded.config.id2label[i] for i in range(len(labels))] == list(expected)
    assert loaded.classifier.weight.shape == (2, 32)
    weight = saved.classifier.weight
    assert torch.equal(loaded.classifier.weight, weight) == (kept and len(weight) == 2)
    body = {n: p for n, p in saved.state_dict().items() if not n.startswith("classifier")}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in body.items())


def test_a_head_that_mean_pooling_leaves_out_has_no_order(place, tmp_path):
    classifier(place, tmp_path / "model", ("positive", "negative"))
    given = ("negative", "positive")
    assert labels_of_head(str(tmp_path / "model"), given, "mean") == (given, "")
    assert labels_of_head(str(place / "model"), given) == (given, "")


def test_a_run_starts_from_the_head_that_its_model_has(place, tmp_path):
    """Trained with the labels the other way round, it is as good before a run as it was."""
    classifier(place, tmp_path / "model", ("good", "bad"))
    others = {"model": str(tmp_path / "model"), "pooling": "model", "lr": 5e-3}
    whole = run(place, tmp_path / "whole", "full", **others)
    assert whole["after"] > 0.9
    folder = tmp_path / "whole" / "adapter"
    assert load_trained(folder).labels == ("good", "bad")
    assert load_trained(folder).positive_label == "good"  # by the data, not by the outputs
    again = run(place, tmp_path / "again", "speft", **{**others, "model": str(folder)}, max_steps=2)
    assert again["before"] == whole["after"]
    assert load_trained(tmp_path / "again").labels == ("good", "bad")


def test_a_run_says_that_it_draws_a_head_anew(place, tmp_path):
    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    notes = []
    classifier(place, tmp_path / "model", ("fine", "awful"))
    others = {"model": str(tmp_path / "model"), "pooling": "model", "max_steps": 1}
    run(place, tmp_path / "run", "head", display=Noting(), **others)
    assert "for the labels ['fine', 'awful'] and the data has ['bad', 'good']" in notes[0]
