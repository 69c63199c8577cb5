"""Conversations in the model's own chat template: what is read, what is learnt, what is refused."""

import json

import pytest
from tiny_text import save_llama, write_jsonl
from transformers import AutoTokenizer

from speft_kernels.cli import main
from speft_kernels.errors import DataError
from speft_kernels.finetune.data import read_examples
from speft_kernels.finetune.models import load_tokenizer
from speft_kernels.finetune.tasks import IGNORED, CausalLM

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def said(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save_llama(folder / "model", ["one plus two is three", "[user] [assistant]"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(str(folder / "model"))


def encoded(tokenizer, tmp_path, *conversations, length=256):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": each} for each in conversations])
    return CausalLM(tokenizer, length).encode(read_examples(str(path), "causal-lm"))


def learnt(item):
    pairs = zip(item.inputs["input_ids"], item.labels, strict=True)
    return [token for token, label in pairs if label != IGNORED]


def test_the_last_reply_is_learnt_behind_what_the_model_is_asked_with(tokenizer, tmp_path):
    messages = said("one plus two", "three", "and one", "four")
    (item,) = encoded(tokenizer, tmp_path, messages)
    asked = tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, return_dict=False
    )
    reply = learnt(item)
    assert item.inputs["input_ids"] == asked + reply
    assert tokenizer.decode(reply) == "four</s>"  # and not the newline behind it
    assert tokenizer.decode(asked) == (
        "<s>[user]\none plus two</s>\n[assistant]\nthree</s>\n[user]\nand one</s>\n[assistant]\n"
    )


def test_a_reply_that_ends_with_another_token_is_learnt_as_the_template_writes_it(
    tokenizer, tmp_path
):
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "<end>")
    (item,) = encoded(tokenizer, tmp_path, said("one", "two"))
    assert tokenizer.decode(learnt(item)) == "two<end>\n"


def test_a_reply_that_holds_the_stop_token_is_learnt_to_its_end(tokenizer, tmp_path):
    (item,) = encoded(tokenizer, tmp_path, said("one", "two</s>three"))
    assert tokenizer.decode(learnt(item)) == "two</s>three</s>"


def test_a_template_that_has_no_stop_token_at_hand(tokenizer, tmp_path):
    tokenizer.eos_token = None
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "")
    (item,) = encoded(tokenizer, tmp_path, said("one", "two"))
    assert tokenizer.decode(learnt(item)) == "two\n"


def test_what_a_template_adds_to_the_last_reply_alone_is_learnt(tokenizer, tmp_path):
    """As of models that think: the thoughts of earlier replies are left out of what is asked."""
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}",
    )
    (item,) = encoded(tokenizer, tmp_path, said("one", "two", "three", "four"))
    assert tokenizer.decode(learnt(item)) == "<think></think>four</s>"
    assert tokenizer.decode(item.inputs["input_ids"]).count("<think>") == 1


def test_the_fields_of_earlier_messages_are_the_templates(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m.content }}",
        "{{ m.content or '' }}{% for c in m.calls or [] %}{{ c.name }}{% endfor %}",
    )
    called = {"role": "assistant", "content": None, "calls": [{"name": "add"}]}
    messages = [*said("one plus two"), called, {"role": "tool", "content": "3"}, *said("", "three")]
    (item,) = encoded(tokenizer, tmp_path, messages)
    assert "[assistant]\nadd</s>\n[tool]\n3</s>" in tokenizer.decode(item.inputs["input_ids"])


def test_a_conversation_that_does_not_fit_is_left_out(tokenizer, tmp_path):
    items = encoded(tokenizer, tmp_path, said("one " * 99, "two"), said("one", "two"), length=40)
    assert [tokenizer.decode(learnt(item)) for item in items] == ["two</s>"]


BAD = {
    "text": ("one", "is 'one', not a list"),
    "none": (None, "is None, not a list"),
    "empty": ([], "not a list of two messages or more"),
    "alone": (said("one", "two")[1:], "not a list of two messages or more"),
    "no role": ([{"content": "one"}, *said("one", "two")], "place 1 .*no 'role'"),
    "no message": ([*said("one"), "two"], "place 2 'two', which has no 'role'"),
    "number": ([{"role": 3, "content": "one"}, *said("one", "two")], "has no 'role'"),
    "question last": (said("one", "two", "three"), "ends with a message of 'user'"),
    "empty reply": (said("one", " "), "ends with the content ' '"),
    "no reply": ([*said("one"), {"role": "assistant"}], "ends with the content None"),
    "pieces": (said("one", [{"type": "text", "text": "two"}]), "ends with the content"),
    "surrogate": (said("one\ud800", "two"), "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_messages_that_are_none_are_refused_with_their_line(name, tmp_path):
    messages, reason = BAD[name]
    rows = [{"messages": said("one", "two")}, {"messages": messages}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: 'messages' .*{reason}"):
        read_examples(str(path), "causal-lm")


def test_a_row_without_messages_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": said("one", "two")}, {"text": "one"}])
    with pytest.raises(DataError, match="line 2: 'messages' is missing"):
        read_examples(str(path), "causal-lm")


def test_what_json_cannot_hold_is_refused():
    """A dataset's rows come from elsewhere than JSON."""
    from speft_kernels.finetune.chat import as_text

    with pytest.raises(ValueError, match="not what JSON can hold"):
        as_text([{"role": "user", "content": b"one"}, *said("one", "two")])


TEMPLATES = {
    "none": (None, "this model's tokenizer has none"),
    "refusing": ("{{ raise_exception('no system role') }}", "refused .*: no system role"),
    "broken": ("{% for %}", "is refused by the model's chat template"),
    "failing": ("{{ messages[9].content }}", "is refused by the model's chat template"),
    "other beginning": (TEMPLATE + "<think>", "does not show the last reply behind"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_cannot_serve_are_refused(name, tokenizer, tmp_path):
    tokenizer.chat_template, reason = TEMPLATES[name]
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: 'messages' .*{reason}"):
        encoded(tokenizer, tmp_path, said("one", "two"))


def test_the_command_trains_on_conversations_and_keeps_the_template(folder, tmp_path, capsys):
    rows = [{"messages": said(f"{a} plus {b}", str(a + b))} for a in range(6) for b in (1, 2)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    run = tmp_path / "run"
    flags = [
        *("finetune", "--task", "causal-lm", "--model", str(folder / "model")),
        *("--train", str(data), "--eval", str(data), "--output", str(run)),
        *("--density", "0.1", "--epochs", "12", "--lr", "2e-2", "--batch-size", "4"),
        *("--scoring-examples", "8", "--scoring-batches", "2"),
    ]
    assert main([*flags, "--dry-run"]) == 0
    assert not run.exists()
    assert main(flags) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["after"] < 0.7 * result["before"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    assert f"{result['after']:.4f}" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE


def test_a_model_without_a_template_is_refused_before_anything_is_written(tmp_path, capsys):
    save_llama(tmp_path / "model", ["one two"])
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": said("one", "two")}] * 4)
    flags = ["finetune", "--task", "causal-lm", "--model", str(tmp_path / "model")]
    flags += ["--train", str(data), "--eval", str(data), "--output", str(tmp_path / "run")]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "a.jsonl, line 1: 'messages' needs a chat template" in error
    assert not (tmp_path / "run").exists()
