import json
import math

import pytest
import torch
from tiny_text import save_llama, write_jsonl
from transformers import AutoModelForCausalLM

from speft_kernels.adapter import load_adapter
from speft_kernels.cli import main
from speft_kernels.errors import DataError
from speft_kernels.finetune.config import TASKS, RunConfig
from speft_kernels.finetune.data import read_examples
from speft_kernels.finetune.models import load_tokenizer
from speft_kernels.finetune.tasks import IGNORED, CausalLM


@pytest.fixture
def gsm8k(data_dir, tmp_path_factory):
    """A folder with a tiny Llama, its tokenizer, and the shortest examples of GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    lines = (data_dir / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()
    records = sorted(map(json.loads, lines), key=lambda r: len(r["question"] + r["answer"]))[:240]
    texts = [text for record in records for text in record.values()]
    save_llama(folder / "model", texts)
    write_jsonl(folder / "train.jsonl", records[::2])
    write_jsonl(folder / "eval.jsonl", records[1::4])
    return folder


def flags(folder, output, *more):
    return [
        "finetune",
        *("--task", "causal-lm", "--model", str(folder / "model")),
        *("--train", str(folder / "train.jsonl"), "--eval", str(folder / "eval.jsonl")),
        *("--output", str(output), "--max-length", "128", "--batch-size", "8"),
        *("--scoring-examples", "16", "--scoring-batches", "2"),
        *more,
    ]


def test_sparse_training_lowers_the_loss_on_gsm8k(gsm8k, tmp_path):
    output = tmp_path / "run"
    more = ("--density", "0.05", "--epochs", "8", "--lr", "5e-2")
    assert main(flags(gsm8k, output, *more)) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["metric"] == "loss"
    uniform = math.log(400)  # the loss of giving every token the same probability
    assert result["after"] < uniform - 0.4 < uniform < result["before"]
    assert result["eval"]["perplexity"] == pytest.approx(math.exp(result["after"]))
    assert result["head_parameters"] == 0
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    evaluations = [entry["eval"]["loss"] for entry in log if "eval" in entry]
    assert len(evaluations) == 8
    assert evaluations[-1] < evaluations[3] < evaluations[0]

    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(output), "--output", str(merged)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    sparse = AutoModelForCausalLM.from_pretrained(gsm8k / "model").eval()
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        untrained = sparse(ids).logits
        load_adapter(sparse, output / "adapter")
        torch.testing.assert_close(plain(ids).logits, sparse(ids).logits)
        assert not torch.allclose(untrained, sparse(ids).logits)


def test_lora_trains_the_same_layers(gsm8k, tmp_path):
    output = tmp_path / "run"
    assert (
        main(flags(gsm8k, output, "--method", "lora", "--lora-rank", "2", "--max-steps", "4")) == 0
    )
    result = json.loads((output / "result.json").read_text())
    layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert result["trainable_parameters"] == 2 * 2 * layer


def test_only_the_response_is_learnt(gsm8k, tmp_path):
    tokenizer = load_tokenizer(str(gsm8k / "model"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "One two", "response": "three"}] * 2)
    task = CausalLM(tokenizer, 128)
    item = task.encode(read_examples(str(path), "causal-lm"))[0]
    ids, labels = item.inputs["input_ids"], item.labels
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "three</s>"
    assert tokenizer.decode(ids) == "<s>One two\nthree</s>"
    assert [label for label in labels if label != IGNORED] == learnt


def test_the_loss_is_the_mean_over_response_tokens(gsm8k):
    model = AutoModelForCausalLM.from_pretrained(gsm8k / "model").eval()
    task = CausalLM(load_tokenizer(str(gsm8k / "model")), 128)
    encoded = task.encode(read_examples(str(gsm8k / "eval.jsonl"), "causal-lm"))[:6]
    batch = task.collate(encoded)
    with torch.no_grad():
        total, _ = task.loss(model, batch.inputs)
        expected = model(**batch.inputs).loss
    torch.testing.assert_close(total / batch.count, expected)
    assert batch.tokens == sum(item.length for item in encoded)
    assert batch.count < batch.tokens


def test_plain_text_is_learnt_whole(gsm8k, tmp_path):
    tokenizer = load_tokenizer(str(gsm8k / "model"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "One two three"}])
    item = CausalLM(tokenizer, 128).encode(read_examples(str(path), "causal-lm"))[0]
    assert item.labels == item.inputs["input_ids"]
    assert tokenizer.decode(item.labels) == "<s>One two three</s>"


def test_responses_that_do_not_fit_are_left_out_or_refused(gsm8k, tmp_path):
    tokenizer = load_tokenizer(str(gsm8k / "model"))
    records = [{"prompt": "word " * 50, "response": "x"}, {"prompt": "w", "response": "x " * 50}]
    examples = read_examples(str(write_jsonl(tmp_path / "a.jsonl", records)), "causal-lm")
    encoded = CausalLM(tokenizer, 16).encode(examples)
    assert [item.length for item in encoded] == [16]
    alone = read_examples(str(write_jsonl(tmp_path / "b.jsonl", records[:1])), "causal-lm")
    with pytest.raises(DataError, match="max_length = 16 leaves no token to learn"):
        CausalLM(tokenizer, 16).encode(alone)


def test_responses_that_lose_their_end_are_counted(gsm8k, tmp_path, capsys):
    """Of two that fit, one by a token, and of two that do not."""
    tokenizer = load_tokenizer(str(gsm8k / "model"))
    rows = [{"prompt": "w", "response": "x" * n} for n in (1, 12, 13, 40)]
    lengths = [len(tokenizer(f"w\n{row['response']}</s>").input_ids) for row in rows]
    path = write_jsonl(tmp_path / "a.jsonl", rows * 4)
    length = lengths[1]
    assert lengths[0] < length < lengths[2]
    settings = ("--train", str(path), "--eval", str(path), "--max-length", str(length))
    assert main(flags(gsm8k, tmp_path / "run", *settings, "--dry-run")) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"{path}: 8 of 16 examples are longer than --max-length; where their") == 2
    assert main(flags(gsm8k, tmp_path / "run", *settings[:4], "--dry-run")) == 0
    assert "longer" not in capsys.readouterr().err


def test_a_response_is_cut_where_a_sentence_would_be_long_enough():
    found = {task: RunConfig(train="-", output="-", task=task).max_length for task in TASKS}
    assert found == {"classification": 128, "causal-lm": 1024}
    assert RunConfig(train="-", output="-", task="causal-lm", max_length=64).max_length == 64
