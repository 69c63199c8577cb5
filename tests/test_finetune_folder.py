"""A run and what it stands on: its folder is its own, and it goes on over nothing that changed."""

import json
import os
import resource
import shutil
import signal
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Silent, run, tensors, terminate
from tiny_text import write_tsv
from transformers import AutoConfig, AutoTokenizer

from speft_kernels.cli import main
from speft_kernels.errors import AdapterError, ConfigError, OutputError, SpeftError
from speft_kernels.files import alone, write_json
from speft_kernels.finetune.inputs import weights_digest
from speft_kernels.finetune.models import labels_of_head
from speft_kernels.finetune.signals import Interrupted


@pytest.fixture
def own(place, tmp_path):
    return shutil.copytree(place, tmp_path / "place")


def interrupted(place, output):
    with pytest.raises(Interrupted):
        run(place, output, display=Silent(3, terminate))
    return output


def other_weights(place):
    path = place / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if tensors[name].dim() == 2)
    tensors[name][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def other_tokens(place):
    path = place / "model" / "tokenizer.json"
    described = json.loads(path.read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(described))


@pytest.mark.parametrize("change", [other_weights, other_tokens])
def test_a_run_does_not_go_on_over_another_model_or_tokenizer(own, tmp_path, change):
    output = interrupted(own, tmp_path / "run")
    change(own)
    with pytest.raises(ConfigError, match="the model or its tokenizer has changed"):
        run(own, output, resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", 0.5, "lr = 0.02 and cannot go on with 0.5"),
        ("epochs", 1, "epochs = 3 and cannot go on with 1"),
        ("seed", 7, "seed = 0 and cannot go on with 7"),
    ],
)
def test_a_run_does_not_go_on_with_settings_that_were_changed_in_its_folder(
    place, tmp_path, capsys, key, value, message
):
    output = interrupted(place, tmp_path / "run")
    config = json.loads((output / "config.json").read_text())
    config["settings"][key] = value
    write_json(output / "config.json", config)
    assert main(["finetune", "--resume", "--output", str(output)]) == 2
    assert f"config.json was changed: the run began with {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "part", "change", "message"),
    [
        ("speft", "progress", {"step": 50, "step_seconds": [0.1] * 50}, "step 50 of 36"),
        ("speft", "progress", {"best": {"loss": 1.0}}, "'accuracy'"),
        ("speft", "progress", {"before": {}}, "'accuracy'"),
        ("rigl", "facts", {"left": {"x": 1}}, "'backbone.encoder"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_run_is_refused(
    place, tmp_path, method, part, change, message
):
    output = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(place, output, method, display=Silent(3, terminate))
    state = torch.load(output / "checkpoint" / "state.pt", weights_only=True)
    state[part].update(change)
    torch.save(state, output / "checkpoint" / "state.pt")
    with pytest.raises(ConfigError, match=f"checkpoint is damaged .{message}"):
        run(place, output, method, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda left, own: {"values": left["values"][:-1]}, "left other values"),
        (lambda left, own: {"base_values": left["base_values"][:, None]}, "left other values"),
        (lambda left, own: {"shape": left["shape"][::-1]}, "another shape"),
        (
            lambda left, own: {
                "indices": own[:1],
                **{key: left[key][:1] for key in ("values", "base_values")},
            },
            "trains entries that",
        ),
    ],
)
def test_what_a_moving_mask_left_behind_has_to_fit_its_layers(place, tmp_path, change, message):
    output = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(place, output, "merge", display=Silent(14, terminate))
    path = output / "checkpoint" / "state.pt"
    state = torch.load(path, weights_only=True)
    facts = state["facts"]
    name = next(name for name in facts["left"] if name.endswith("intermediate.dense"))
    left, own = facts["left"][name], facts["patterns"][name]["indices"]
    left.update(change(left, own))
    torch.save(state, path)
    with pytest.raises(ConfigError, match=f"checkpoint is damaged .layer '{name}'.* {message}"):
        run(place, output, "merge", resume=True)


@pytest.mark.parametrize(
    "name", ["adapter", "checkpoint", "metrics.jsonl", "checkpoint/state.pt", "checkpoint/best"]
)
def test_a_run_that_goes_on_follows_no_link_out_of_its_folder(place, tmp_path, name):
    """It replaces its adapter and deletes its checkpoint, wherever they are said to be."""
    output = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(place, output, "full", display=Silent(14, terminate))
    path = output / name.replace("best", "best.safetensors")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="is a link, .* so --resume does not write there"):
        run(place, output, "full", resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint/state.pt"])
def test_a_pipe_in_the_place_of_a_runs_file_is_not_waited_for(place, tmp_path, name):
    output = interrupted(place, tmp_path / "run")
    (output / name).unlink()
    os.mkfifo(output / name)
    with pytest.raises(ConfigError, match="no file, so --resume does not write there"):
        run(place, output, resume=True)


@pytest.mark.parametrize("method", ["speft", "full"])
def test_what_else_lies_beside_an_adapter_is_not_lost(place, tmp_path, method):
    output = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(place, output, method, display=Silent(14, terminate))
    (output / "adapter" / "card.md").write_text("mine")
    with pytest.raises(ConfigError, match="'card.md'.*, so --resume does not delete it"):
        run(place, output, method, resume=True)

    def write():
        (other / "adapter" / "card.md").write_text("mine")

    other = tmp_path / "other"
    with pytest.raises(AdapterError, match="'card.md'"):
        run(place, other, method, display=Silent(2, write), eval_every=1)
    assert (other / "adapter" / "card.md").read_text() == "mine"


def test_a_folder_is_one_processs(place, tmp_path):
    output = interrupted(place, tmp_path / "run")
    before = (output / "metrics.jsonl").read_bytes()
    with alone(output):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match="another process is writing to"):
                run(place, output, **how)
    assert (output / "metrics.jsonl").read_bytes() == before
    run(place, output, resume=True)


def test_a_folder_that_another_process_made_meanwhile_is_left_alone(place, tmp_path):
    output = tmp_path / "run"

    class Meanwhile(Silent):
        def note(self, text):
            output.mkdir(exist_ok=True)

    with pytest.raises(ConfigError, match="was made by another process meanwhile"):
        run(place, output, display=Meanwhile())
    assert not list(output.iterdir())


@pytest.mark.parametrize(
    "left", ['{"step": "x"}\n', '{"step": 1e999}\n', "null\n", "[1]\n", "[" * 100_000 + "\n"]
)
def test_lines_of_metrics_that_say_nothing_do_not_end_a_run(place, tmp_path, left):
    output = interrupted(place, tmp_path / "run")
    with open(output / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(left)
    with open(output / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    run(place, output, resume=True)
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert steps[-1] == 36


def test_tokens_that_the_model_has_no_embeddings_for_are_refused(own, tmp_path):
    path = own / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name] = tensors[name][:8].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    described = json.loads((own / "model" / "config.json").read_text())
    described["vocab_size"] = 8
    (own / "model" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="embeddings for 8: they do not belong together"):
        run(own, tmp_path / "run")


def test_token_types_that_the_model_has_no_embeddings_for_are_refused(own, tmp_path):
    """As where the tokenizer is one of BERT's kind and the model of RoBERTa's, which has one."""
    rows = [("a film", "a film", "good"), ("a film", "a town", "bad")]
    for name in ("train.tsv", "eval.tsv"):
        write_tsv(own / name, rows, "sentence1\tsentence2\tlabel")
    path = own / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("token_type_embeddings.weight"))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    described = json.loads((own / "model" / "config.json").read_text())
    (own / "model" / "config.json").write_text(json.dumps({**described, "type_vocab_size": 1}))
    path = own / "model" / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": names}))
    message = "makes token type 1 of .*train.tsv and the model has embeddings for 1: they do not"
    with pytest.raises(ConfigError, match=message):
        run(own, tmp_path / "run")


def test_what_only_looks_like_weights_is_not_read(own, tmp_path):
    whole = weights_digest(str(own / "model"))
    (own / "model" / "a.safetensors").mkdir()
    os.mkfifo(own / "model" / "b.safetensors")
    assert weights_digest(str(own / "model")) == whole


@pytest.mark.parametrize("architectures", [5, [5], "BertForSequenceClassification"])
def test_architectures_that_are_no_list_of_names_are_none(own, tmp_path, architectures):
    described = json.loads((own / "model" / "config.json").read_text())
    described["architectures"] = architectures
    (own / "model" / "config.json").write_text(json.dumps(described))
    try:
        AutoConfig.from_pretrained(own / "model")
    except Exception:  # some versions of transformers check the type
        expected = pytest.raises(ConfigError, match="'architectures': TypeError: Field 'archit")
    else:
        expected = nullcontext()
    with expected:
        assert labels_of_head(str(own / "model"), ["x", "y"], "model") == (("x", "y"), "")


def test_a_padding_token_that_the_model_has_no_embedding_for_is_refused(own, tmp_path):
    """One that was added to the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(own / "model")
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(own / "model")
    with pytest.raises(ConfigError, match=r"pads with token (\d+) and .* embeddings for \1: save"):
        run(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_links_back_to_itself_is_refused(place, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    # Python tells of it before 3.13, then the system.
    found = r"output = .*loop.* is no path|loop.* cannot be written: .*symbolic links"
    with pytest.raises((ConfigError, OutputError), match=found):
        run(place, tmp_path / "loop" / "run")


@contextmanager
def files_of_at_most(size):
    """A full disk: what is written beyond `size` bytes of a file fails, as the system says it."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("method", "size", "others", "name"),
    [
        ("speft", 100, {}, "metrics.jsonl"),
        ("speft", 2000, {"save_every": 4}, "checkpoint/state.pt"),
        ("speft", 2000, {}, "checkpoint/best.safetensors"),
        ("merge", 2000, {}, "adapter"),
        ("lora", 2000, {}, "checkpoint/best.safetensors"),
    ],
)
def test_a_full_disk_is_said_so_and_the_run_goes_on_afterwards(
    place, tmp_path, method, size, others, name
):
    whole, output = tmp_path / "whole", tmp_path / "a run"
    run(place, whole, method, **others)
    with ExitStack() as full:
        display = Silent(3, lambda: full.enter_context(files_of_at_most(size)))
        with pytest.raises(
            SpeftError,
            match=f"{name} cannot be written: .*; once that is mended, --resume --output '.*run' ",
        ):
            run(place, output, method, display=display, **others)
    assert not list(output.rglob("*.tmp"))
    result = run(place, output, method, resume=True, **others)
    assert result["steps"] == 36
    expected, found = tensors(whole), tensors(output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_disk_that_is_full_before_the_first_step_leaves_no_folder(place, tmp_path):
    with ExitStack() as full:

        class Full(Silent):
            def note(self, text):
                if text.startswith("training") or " training " in text:
                    full.enter_context(files_of_at_most(2000))

        with pytest.raises(OutputError, match="state.pt cannot be written: File too large"):
            run(place, tmp_path / "run", display=Full())
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe is no file, so it is not replaced by one"):
        write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
