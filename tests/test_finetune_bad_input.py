"""Settings, models and checkpoints that no run can use are refused in one line that says why."""

import copy
import os
import time
import zipfile

import pytest
import torch
from tiny_text import save_bert
from torch import nn

from speft_kernels.errors import ConfigError, DataError
from speft_kernels.finetune.checkpoint import (
    Progress,
    load_tensors,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
    save_tensors,
)
from speft_kernels.finetune.config import RunConfig, load_json, load_yaml
from speft_kernels.finetune.data import read_examples
from speft_kernels.finetune.inputs import ScoringBatches, check_rank
from speft_kernels.finetune.models import folder_or_id, pooling_of
from speft_kernels.finetune.signals import StopSignals
from speft_kernels.finetune.tasks import Encoded
from speft_kernels.finetune.yaml_file import read_yaml
from speft_kernels.targets import Targets


def config_of(**settings):
    return RunConfig.from_dict({"train": "x", "output": "y", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**32}, "seed = 4294967296 must be less than 4294967296"),
        ({"max_length": 2**31}, "max_length = 2147483648 must be less than"),
        ({"lr": 10**400}, "lr is too large a number"),
        ({"scoring_examples": str(10**19)}, "scoring_examples is too large"),
        ({"block_shape": [2**63, 1]}, "block_shape is too large"),
        ({"scope": "bloc", "method": "full"}, "scope = 'bloc' .*layer, global"),
        ({"mode": "aditive", "method": "head"}, "mode = 'aditive' .*additive"),
    ],
)
def test_values_have_bounds(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "1_0"), ("seed", "1_0"), ("lr", "1_0e-4"), ("block_shape", "1_6x16")],
)
def test_numbers_have_no_underscores(name, value):
    with pytest.raises(ConfigError, match=f"{name} = '{value}' is (not|like)"):
        config_of(**{name: value})


def test_a_pipe_keeps_the_name_that_the_shell_gave_it():
    """As in --train <(zcat train.tsv.gz): what it is a link to is no file."""
    read, write = os.pipe()
    path = f"/dev/fd/{read}"
    try:
        config = config_of(train=path).located()
        assert config.train == path
        with pytest.raises(DataError, match=f"{path} is a pipe or a device"):
            read_examples(config.train, "classification")
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("name", ["train", "eval", "test", "model", "mask", "output"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("~nosuchuser/x", "home directory"),
        ("folder/" + "x" * 256, "too long"),
        ("\u00e9" * 128, "too long"),  # 256 bytes
        ("folder/" * 600, "too long"),
        ("a\0b", "null byte"),
        ("a\udcff", "surrogates not allowed"),  # a name that is not UTF-8
    ],
)
def test_a_path_that_no_file_can_have_is_refused(name, value, reason):
    with pytest.raises(ConfigError, match=f"{name} = .* is no path: .*{reason}"):
        config_of(**{name: value})


def test_a_model_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="model = '~nosuchuser/x' is no path"):
        folder_or_id("~nosuchuser/x")


@pytest.mark.parametrize(
    "content",
    ["seed: 2020-13-45", "seed: " + "1" * 5000, "a: " + "[" * 20_000],
    ids=["date", "digits", "nested"],
)
def test_yaml_that_python_cannot_hold_is_refused(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1:30", "90"), ("010", "8"), ("-010", "-8"), ("1_0", "10"), ("1:30.5", "90.5")],
)
@pytest.mark.parametrize("place", ["epochs: {}", "epochs: [1, {}]", "{}: 1"])
def test_numbers_that_yaml_reads_in_its_own_way_are_refused(tmp_path, text, number, place):
    path = tmp_path / "a.yaml"
    path.write_text(place.format(text))
    with pytest.raises(ConfigError, match=f"'{text}' is the number {number} to YAML: write that"):
        load_yaml(path)


def test_other_numbers_of_yaml_are_read_as_they_are(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 0x10\nepochs: 0\nclip: 0.50\nlr: 1.0e-4\npositive_label: '010'\n")
    wanted = {"seed": 16, "epochs": 0, "clip": 0.5, "lr": 1e-4, "positive_label": "010"}
    assert load_yaml(path) == wanted


def test_an_endless_number_is_not_shown(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 0x" + "f" * 5000)
    with pytest.raises(ConfigError, match="seed is too large a number"):
        load_yaml(path)


def test_null_is_the_default_where_the_default_is_left_to_us(tmp_path):
    names = ("salience", "selection", "head_warmup_steps", "lr", "metric")
    path = tmp_path / "a.yaml"
    path.write_text("".join(f"{name}: null\n" for name in names))
    assert config_of(**load_yaml(path)) == config_of(**dict.fromkeys(names)) == config_of()
    path.write_text("epochs: null")
    with pytest.raises(ConfigError, match="epochs = None is not a whole number"):
        load_yaml(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_models_pooling_that_cannot_be_read_is_refused(tmp_path, content):
    folder = save_bert(tmp_path / "model", ["some words of a text"])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"1_Pooling/config.json: damaged"):
        pooling_of(str(folder))


def test_more_scoring_batches_than_rows_have_one_each():
    class Rows:
        def collate(self, rows):
            return type("Batch", (), {"inputs": [row.labels for row in rows]})

    train = [Encoded({"input_ids": [1]}, n) for n in range(3)]
    config = config_of(scoring_batches=10**13, scoring_examples=10**13)
    batches = ScoringBatches(Rows(), train, config, StopSignals(), 0)
    assert sorted(batches) == [[0], [1], [2]]


@pytest.mark.parametrize(("method", "highest"), [("lora", 6), ("pissa", 6), ("shira", 2)])
def test_a_rank_has_to_fit_the_layers(method, highest):
    targets = Targets({"a": nn.Linear(6, 8), "b": nn.Linear(4, 6)}, ())
    check_rank(config_of(method=method, lora_rank=highest), targets)
    with pytest.raises(ConfigError, match=f"layers allow {highest} at most with method '{method}'"):
        check_rank(config_of(method=method, lora_rank=highest + 1), targets)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a model after one step, with what it was made from."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    pattern = {"shape": (2, 3), "block_shape": (1, 1), "indices": torch.tensor([1])}
    facts = {"fingerprint": "0", "settings": {}, "patterns": {"a": pattern}, "left": {}}
    progress = Progress(step=1, step_seconds=[0.1], best={"accuracy": 0.5}, salience={"a": 1})
    path = tmp_path / "state.pt"
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    save_checkpoint(path, progress, model, facts, **parts)
    return path, progress, model, parts


def test_a_sound_checkpoint_is_restored(saved):
    path, progress, model, parts = saved
    state = read_checkpoint(path)
    assert restore_checkpoint(state, path, model, **parts) == progress


def test_moments_are_taken_into_memory_of_their_own(saved):
    """One number that says it were a matrix has the right shape, and no room to write to."""
    path, _, model, parts = saved
    state = read_checkpoint(path)
    state["parts"]["optimizer"]["state"][0]["exp_avg"] = torch.tensor([0.5]).expand(2, 3)
    restore_checkpoint(state, path, model, **parts)
    moment = parts["optimizer"].state[model.weight]["exp_avg"]
    assert moment.stride() == (3, 1)
    assert torch.equal(moment, torch.full((2, 3), 0.5))


MISSING = object()
NESTED: list[object] = [1]
for _ in range(30):
    NESTED = [NESTED, NESTED]
DAMAGES = {
    "no facts": (["facts"], MISSING),
    "no fingerprint": (["facts", "fingerprint"], MISSING),
    "pattern without indices": (["facts", "patterns", "a", "indices"], MISSING),
    "another key": (["progress", "mood"], 1),
    "step as text": (["progress", "step"], "1"),
    "steps that were not timed": (["progress", "step"], 10**9),
    "metric as text": (["progress", "best", "accuracy"], "high"),
    "seconds as text": (["progress", "step_seconds"], ["long"]),
    "parameters as list": (["parameters"], [1]),
    "parameter as number": (["parameters", "bias"], 1.0),
    "no random state": (["random", "cpu"], MISSING),
    "a short random state": (["random", "cpu"], torch.zeros(3, dtype=torch.uint8)),
    "no optimizer": (["parts", "optimizer"], MISSING),
    "an empty optimizer": (["parts", "optimizer"], {}),
    "an optimizer of no groups": (["parts", "optimizer", "param_groups"], []),
    "an optimizer of numbers": (["parts", "optimizer", "param_groups"], [1]),
    "a rate as text": (["parts", "optimizer", "param_groups", 0, "lr"], "high"),
    "a rate beyond any float": (["parts", "optimizer", "param_groups", 0, "lr"], 10**400),
    # The optimizer itself takes it, and then writes past its end.
    "a moment of one number": (["parts", "optimizer", "state", 0, "exp_avg"], torch.zeros(1)),
    "a moment as list": (["parts", "optimizer", "state", 1, "exp_avg_sq"], [0.0, 0.0]),
    "a moment too few": (["parts", "optimizer", "state", 0, "exp_avg"], MISSING),
    "moments of no parameter": (["parts", "optimizer", "state", 7], {"step": 1}),
    "many steps in place of one": (["parts", "optimizer", "state", 0, "step"], torch.ones(2)),
    "rates of another number": (["parts", "scheduler", "base_lrs"], [0.1, 0.1]),
    "a scheduler's method": (["parts", "scheduler", "step"], 1),
    "figures that no JSON holds": (["progress", "salience", "a"], torch.ones(1)),
    "a tensor that repeats one number": (["facts", "left"], {"a": torch.ones(1).expand(10**12)}),
    "a tensor of no device": (["facts", "left"], {"a": torch.ones(1, device="meta")}),
    "a tensor of few entries": (["facts", "left"], {"a": torch.ones(1).to_sparse()}),
    "lists without end": (["progress", "salience", "a"], NESTED),
    "settings as list": (["facts", "settings"], []),
    "settings that no JSON holds": (["facts", "settings"], {"lr": torch.ones(2)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(saved, damage):
    path, _, model, parts = saved
    (*folders, last), value = DAMAGES[damage]
    state = part = torch.load(path, weights_only=True)
    for folder in folders:
        part = part[folder]
    if value is MISSING:
        del part[last]
    else:
        part[last] = copy.copy(value)
    torch.save(state, path)
    with pytest.raises(ConfigError, match="checkpoint is damaged .*--overwrite"):
        restore_checkpoint(read_checkpoint(path), path, model, **parts)


def test_a_checkpoint_with_a_flipped_bit_in_a_key_is_refused(saved):
    path = saved[0]
    path.write_bytes(path.read_bytes().replace(b"fingerprint", b"fingerprin\xff"))
    with pytest.raises(ConfigError, match="checkpoint is damaged"):
        read_checkpoint(path)


def test_a_compressed_checkpoint_is_not_unpacked(saved):
    """Of a compressed megabyte torch makes a gigabyte."""
    path = saved[0]
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert torch.load(path, weights_only=True)
    with pytest.raises(ConfigError, match="checkpoint is damaged .it is compressed"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_version_is_refused_as_such(saved):
    torch.save({"format": 1}, saved[0])
    with pytest.raises(ConfigError, match="another version"):
        read_checkpoint(saved[0])


def test_damaged_parameters_of_the_best_model_are_refused(tmp_path):
    path, model = tmp_path / "best.safetensors", nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="checkpoint is damaged"):
        load_tensors(path, model)
    save_tensors(path, model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="checkpoint is damaged"):
        load_tensors(path, model)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nlr: 2\n", "the key 'lr' stands twice"),
        ("head-lr: 1\nhead_lr: 2\n", "'head_lr' stands twice, with '-' and with '_'"),
        (BOMB.replace("i: &i", "train: &i").replace("a: &a", "lr: &a"), "key 'b' is unknown"),
        ("train: &a [x,x]\nlr: [*a,*a]\n", "train = .'x', 'x'. is not text"),
        (f"train: 0x{'f' * 5000}\n", "train = <int of thousands of digits> is not text"),
        (f"target_modules: [-0b{'1' * 20_000}]\n", "target_modules = <.*> is not a list of names"),
        (f"? 0x{'f' * 5000}\n: 1\n", "key '<int of thousands of digits>' is unknown"),
        ("a: &a {<<: {lr: 1, lr: 2}}\n", "the key 'lr' stands twice"),
        ("a: [{<<: &c {lr: 1, lr: 2}}, *c]\n", "the key 'lr' stands twice"),
    ],
)
def test_a_file_of_settings_says_each_thing_once_and_is_answered_in_a_line(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        load_yaml(path)
    assert len(str(refused.value)) < 1000


def test_mappings_that_are_merged_over_and_over_take_no_time(tmp_path):
    """Each level has nine times the entries of the one before, and one key."""
    bomb = BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{lr: 1, epochs: 2}").replace("[", "{<<: [")
    lines = bomb.replace("]", "]}").splitlines()
    path = tmp_path / "settings.yaml"
    path.write_text("\n".join([*lines, "j: {<<: *i, lr: 3}"]))
    before = time.process_time()
    loaded = read_yaml(path)
    assert time.process_time() - before < 5  # it is hundreds of times that without an end
    assert loaded["i"] == {"lr": 1, "epochs": 2}
    assert loaded["j"] == {"lr": 3, "epochs": 2}


def test_a_list_of_lists_without_end_is_not_written_out():
    value = ["x"] * 9
    for _ in range(9):
        value = [value] * 9
    with pytest.raises(ConfigError, match="train = .* is not text"):
        config_of(train=value)


@pytest.mark.parametrize("settings", ["[]", '["lr"]', '""', "[" * 100_000])
def test_a_config_without_settings_is_refused(tmp_path, settings):
    (tmp_path / "config.json").write_text(f'{{"settings": {settings}}}')
    with pytest.raises(ConfigError, match="config.json: (not the config.json of a run|damaged)"):
        load_json(tmp_path / "config.json")


def test_a_decay_without_bound_is_refused():
    with pytest.raises(ConfigError, match="weight_decay = inf must be less than inf"):
        config_of(weight_decay="inf")
