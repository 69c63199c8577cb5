"""A ready mask, as `speft salience` writes it, is trained from zero, and nothing is scored."""

import dataclasses
import json
import re
import shutil
import weakref

import pytest
import torch
from tiny_models import Twins
from tiny_runs import Silent, lines, settings, tensors, terminate
from tiny_studies import write_result
from tiny_text import save_bert, save_llama, write_sums

from speft_kernels.adapter import fingerprint, read_adapter, save_adapter
from speft_kernels.cli import main
from speft_kernels.config import SpeftConfig
from speft_kernels.errors import ConfigError, SpeftError
from speft_kernels.finetune import RunConfig, load_classifier, methods
from speft_kernels.finetune.config import DECIDE_THE_MASK, FIELDS
from speft_kernels.finetune.dry_run import dry_run
from speft_kernels.finetune.mask import Mask, read_mask, targets_of
from speft_kernels.finetune.run import finetune
from speft_kernels.finetune.signals import Interrupted
from speft_kernels.model import apply_patterns
from speft_kernels.pattern import SparsePattern
from speft_kernels.report import write_report
from speft_kernels.study.config import read_study
from speft_kernels.study.inputs import changed_inputs, changed_settings
from speft_kernels.study.runner import collect


def choose(place, output, **others):
    """What `speft salience` writes into a folder."""
    own = {key: v for key, v in settings(place, output, **others).items() if key in SALIENCE}
    flags = [part for key, value in own.items() for part in (f"--{key.replace('_', '-')}", value)]
    assert main(["salience", *map(str, flags)]) == 0
    return output


SALIENCE = ("model", "train", "output", "pooling", "density", "salience", "scope", "block_shape")
SALIENCE += ("scoring_examples", "scoring_batches", "seed")


@pytest.fixture(scope="module")
def mask(place, tmp_path_factory):
    return choose(place, tmp_path_factory.mktemp("mask") / "mask")


def config_of(place, output, mask, **others):
    own = {**settings(place, output), "mask": str(mask), **others}
    return RunConfig.from_dict({key: v for key, v in own.items() if key != "density"})


def train(place, output, mask, *, display=None, resume=False, **others):
    config = config_of(place, output, mask, **others)
    return finetune(config, display=display or Silent(), resume=resume)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("how", "lr"),
    [
        ({}, 8e-3),
        ({"salience": "gradient", "scope": "global", "seed": 3}, 2e-3),
        ({"salience": "magnitude", "block_shape": "4x8"}, 2e-3),
    ],
)
def test_salience_and_then_its_mask_train_what_one_run_trains(
    place, tmp_path, how, lr, monkeypatch
):
    mask = choose(place, tmp_path / "mask", **how)
    more = {"lr": None, "epochs": 1}
    whole = finetune(
        RunConfig.from_dict({**settings(place, tmp_path / "whole", **how), **more}),
        display=Silent(),
    )
    monkeypatch.setattr(methods, "score_and_select", None)  # no second scoring
    # The folder, the adapter in it, and a trained one, whose values do not count.
    for name, given in (("a", mask), ("b", mask / "adapter"), ("c", tmp_path / "whole")):
        result = train(place, tmp_path / name, given, **more, seed=how.get("seed", 0))
        for key in ("before", "after", "eval", "density", "trainable_parameters_without_head"):
            assert result[key] == whole[key], key
        assert_same(tensors(tmp_path / name), tensors(tmp_path / "whole"))
        assert (result["lr"], result["salience_seconds"]) == (lr, 0.0)
        assert (
            read_adapter(tmp_path / name / "adapter").config
            == read_adapter(mask / "adapter").config
        )


def test_a_run_says_which_mask_it_trained(place, mask, tmp_path, capsys):
    output = tmp_path / "run"
    result = train(place, output, mask / ".." / "mask", max_steps=1, mode="additive")
    said = result["mask"]
    assert said["folder"] == str(mask)
    assert f" mask={said['sha256'][:12]}" in result["inputs"]
    # Not where it lies, which says nothing on another machine.
    digest = {"sha256": said["sha256"]}
    assert json.loads((output / "config.json").read_text())["mask"] == digest
    adapter = read_adapter(output / "adapter")
    assert adapter.extra["mask"] == digest
    assert (adapter.config.density, adapter.config.mode) == (0.05, "additive")
    again = train(place, tmp_path / "again", output, max_steps=1)
    assert again["mask"] == {"folder": str(output), "sha256": said["sha256"]}
    assert main(["info", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"  mask: {mask}\n" in printed
    assert "  density:" not in printed  # the default, which is not the mask's
    page = write_report(output).read_text().replace("<wbr>", "")
    assert f">{mask} (SHA-256 of its entries: {said['sha256']})<" in page
    assert page.count(">lr</") == 2  # among those that differ, and among all
    assert ">selection</" not in page


def test_info_shows_what_salience_wrote(mask, capsys):
    assert main(["info", str(mask)]) == 0
    assert "716 sparse values in 12 layers" in capsys.readouterr().out


def test_the_mask_is_read_once_and_its_values_are_let_go(place, mask, tmp_path, monkeypatch):
    readings = []

    def reading(folder):
        file = read_adapter(folder)
        tensors = [*file.dense.values(), *(layer.values for layer in file.layers.values())]
        readings.append([weakref.ref(tensor) for tensor in tensors])
        return file

    monkeypatch.setattr("speft_kernels.finetune.mask.read_adapter", reading)
    config = config_of(place, tmp_path / "run", mask, max_steps=1)
    kept = read_mask(config)
    assert kept.nnz == 716
    assert {reference() for reference in readings.pop()} == {None}
    dry_run(config)
    assert len(readings) == 1
    finetune(config, display=Silent())
    assert len(readings) == 2


def test_a_folder_that_is_an_adapter_is_the_mask_itself(place, mask, tmp_path):
    own = shutil.copytree(mask / "adapter", tmp_path / "own")
    (own / "adapter").mkdir()
    assert read_mask(config_of(place, tmp_path / "run", own)).nnz == 716


def test_a_dry_run_counts_the_mask(place, mask, tmp_path):
    text = dry_run(config_of(place, tmp_path / "run", mask, lr=None))
    assert "716 of them train (4.9944%)" in text
    assert f"  mask: {mask}\n" in text
    assert "learning rates: 0.008," in text
    text = dry_run(config_of(place, tmp_path / "run", mask, model="a/b"))
    assert "a/b (to be downloaded)\n  716 weights train" in text
    assert list(tmp_path.iterdir()) == []


def test_a_mask_of_ones_own_needs_no_recipe_and_may_mix_blocks(place, tmp_path):
    model = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
    first, second = (f"backbone.encoder.layer.{n}.output.dense" for n in (0, 1))
    patterns = {
        first: SparsePattern((32, 48), torch.tensor([3, 5]), (8, 8)),
        second: SparsePattern((32, 48), torch.tensor([7])),
    }
    apply_patterns(model, patterns, SpeftConfig())
    save_adapter(model, tmp_path / "mask")
    result = train(place, tmp_path / "run", tmp_path / "mask", lr=None, max_steps=2)
    assert result["lr"] == 2e-3
    assert result["trainable_parameters_without_head"] == 129
    trained = read_adapter(tmp_path / "run" / "adapter")
    assert (trained.patterns, trained.config) == (patterns, None)
    assert all(layer.values.any() for layer in trained.layers.values())


def test_a_language_models_mask_is_trained(tmp_path):
    data = tmp_path / "train.jsonl"
    save_llama(tmp_path / "model", [row["prompt"] for row in write_sums(tmp_path)])
    own = ["--model", tmp_path / "model", "--train", data, "--task", "causal-lm"]
    own = [str(part) for part in own]
    assert main(["salience", *own, "--output", str(tmp_path / "mask")]) == 0
    more = ["--eval", str(data), "--max-steps", "2", "--batch-size", "4"]
    assert main(["finetune", *own, *more, "--output", str(tmp_path / "whole")]) == 0
    masked = ["--mask", str(tmp_path / "mask"), "--output", str(tmp_path / "run")]
    assert main(["finetune", *own, *more, *masked]) == 0
    assert_same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


OTHERS = {
    **{"salience": "gradient", "selection": "top", "density": 0.01, "lora_budget": 1},
    **{"scope": "global", "sample_columns": 1.0, "target_modules": ["query"]},
    **{"exclude_modules": ["key"], "block_shape": [4, 4], "accumulate": "absolute"},
    **{"accumulator_dtype": "weight", "accumulator_device": "cpu", "grasp_sign": "code"},
    **{"grasp_temperature": 1.0, "dynamic": "rigl"},
}


@pytest.mark.parametrize("name", DECIDE_THE_MASK)
def test_what_decides_a_mask_is_refused_beside_one(tmp_path, name):
    undone = f"{name}: {json.dumps(FIELDS[name].default)}"
    remedy = f"leave {name} out, in a YAML file too (a study's method undoes its base by '{undone}'"
    with pytest.raises(ConfigError, match=f"mask and {name} = .* exclude.*; {re.escape(remedy)}"):
        RunConfig(train="x", output="y", mask=str(tmp_path), **{name: OTHERS[name]})
    # And so it does.
    path = tmp_path / "study.yaml"
    base = f"base: {{validation: 0.1, train: x, test: x, {name}: {json.dumps(OTHERS[name])}}}"
    rest = f"output: {tmp_path}/s\ntasks: {{a: {{}}}}\nlr: 1"
    path.write_text(f"{base}\n{rest}\nmethods: {{ready: {{mask: m, {undone}}}}}")
    assert len(read_study(path).grid()) == 1


def test_an_empty_mask_is_not_the_working_folder(mask, monkeypatch, capsys):
    monkeypatch.chdir(mask)
    command = ["finetune", "--train", "x", "--eval", "x", "--output", "run", "--mask", ""]
    assert main(command) == 2
    assert "mask is empty: name the folder" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--density", "0.005"], ["--salience", "snip"]])
def test_a_flag_that_says_the_default_is_refused_too(tmp_path, capsys, flags):
    command = ["finetune", "--train", "x", "--eval", "x", "--output", str(tmp_path / "run")]
    assert main([*command, "--mask", "m", *flags]) == 2
    assert f"mask and {flags[0][2:]} = " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_other_methods_train_no_mask(method):
    with pytest.raises(ConfigError, match=f"mask = 'm' .* this is method '{method}'"):
        RunConfig(train="x", output="y", mask="m", method=method)


def cut(mask, _):
    path = mask / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def described(change):
    def spoil(mask, place):
        path = mask / "adapter_config.json"
        contents = json.loads(path.read_text())
        change(contents)
        path.write_text(json.dumps(contents))

    return spoil


def emptied(mask, _):
    model = torch.nn.ModuleDict({"classifier": torch.nn.Linear(32, 2)})
    shutil.rmtree(mask)
    save_adapter(model, mask)


def nowhere(contents):
    contents["format"] = "another"


def peft(contents):
    contents.clear()
    contents.update(peft_type="LORA", r=8)


BAD = {
    "missing": (lambda mask, _: shutil.rmtree(mask), "there is no adapter folder"),
    "not an adapter": (described(nowhere), "format must be 'speft-adapter'"),
    "PEFT's": (described(peft), r"adapter of PEFT \('LORA'\), not one of sparse entries"),
    "a file": (lambda mask, _: (shutil.rmtree(mask), mask.touch()), "there is no adapter folder"),
    "damaged": (cut, "does not have the checksum"),
    "empty": (emptied, "is empty: there is no entry"),
}


def of_model(**sizes):
    def made(mask, place):
        folder = mask.parent / "other"
        save_bert(folder / "model", ["a film"], **sizes)
        if not sizes:  # of the same shapes, with one other weight
            state = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
            with torch.no_grad():
                state.backbone.encoder.layer[1].output.dense.weight[0, 0] += 1
            state.backbone.save_pretrained(folder / "model")
        for name in ("train.tsv", "eval.tsv"):
            shutil.copy(place / name, folder / name)
        shutil.rmtree(mask)
        choose(folder, mask)
        shutil.rmtree(folder)

    return made


def pooled(mask, place):
    shutil.rmtree(mask)
    choose(place, mask, pooling="model")


# With the model that the adapter names.
CAUSES = (
    r"another one than it was chosen on \('.*/model'\) or another --pooling is the usual cause: "
)
BAD |= {
    "other shapes": (of_model(intermediate_size=24), rf"{CAUSES}.* \(48, 32\) in the model, \(24"),
    "other layers": (of_model(num_hidden_layers=3), rf"{CAUSES}.*'backbone.encoder.layer.2"),
    "another pooling": (pooled, rf"{CAUSES}the model has no layer 'bert.encoder"),
    "another base": (
        of_model(),
        r"another model: the weight of layer '.*\.1\.output\.dense' differs.* loads float32 weights"
        r".* name the model that it was chosen on \('.*/other/model'\)",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_mask_that_cannot_be_trained_is_refused_and_nothing_is_lost(place, mask, tmp_path, fault):
    spoil, message = BAD[fault]
    own = shutil.copytree(mask / "adapter", tmp_path / "own")
    spoil(own, place)
    before = sorted(tmp_path.rglob("*"))
    config = config_of(place, tmp_path / "run", own)
    with pytest.raises(SpeftError, match=f"^mask {own}.*{message}") as wet:
        finetune(config, display=Silent())
    with pytest.raises(SpeftError) as dry:
        dry_run(config, display=Silent())
    assert str(wet.value) == str(dry.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_layer_of_a_mask_is_the_heads_or_shares_its_weight(place):
    model = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
    config = RunConfig(train="x", output="y", mask="m")
    again = "choose the mask again by 'speft salience --exclude-modules ...'"
    with pytest.raises(ConfigError, match=f"^mask m: .*'classifier' belongs to mod.*; .*{again}"):
        targets_of(mask_of(model, "classifier"), model, config)
    twins = Twins()
    with pytest.raises(ConfigError, match=f"^mask m: .*'left' shares its .* mode=.addit.*{again}"):
        targets_of(mask_of(twins, "left"), twins, config)
    additive = dataclasses.replace(config, mode="additive")
    assert list(targets_of(mask_of(twins, "left"), twins, additive).layers) == ["left"]


def mask_of(model, name):
    layer = model.get_submodule(name)
    pattern = SparsePattern(tuple(layer.weight.shape), torch.tensor([3]))
    return Mask({name: pattern}, {name: fingerprint(layer)}, None, None, "")


def test_a_stopped_run_goes_on_with_its_mask_and_with_no_other(place, mask, tmp_path):
    own = shutil.copytree(mask, tmp_path / "mask")
    more = {"lr": None, "epochs": 1, "eval_every": 5}
    train(place, tmp_path / "whole", own, **more)
    with pytest.raises(Interrupted):
        train(place, tmp_path / "run", own, display=Silent(3, terminate), **more)
    begun = shutil.copytree(tmp_path / "run", tmp_path / "begun")
    with pytest.raises(ConfigError, match="has lr = 0.008 and cannot go on with 0.01"):
        train(place, tmp_path / "run", own, resume=True, **{**more, "lr": 1e-2})
    shutil.rmtree(own)
    with pytest.raises(SpeftError, match="there is no adapter folder"):
        train(place, tmp_path / "run", own, resume=True, **more)
    choose(place, own, seed=5)
    with pytest.raises(ConfigError, match="the data, the mask, the model or its tokenizer has cha"):
        train(place, tmp_path / "run", own, resume=True, **more)
    shutil.rmtree(own)
    # Moved, it is the same by its digest.
    train(place, tmp_path / "run", mask, resume=True, **more)
    shutil.copytree(mask, own)
    assert main(["finetune", "--resume", "--output", str(begun)]) == 0
    for run in (tmp_path / "run", begun):
        assert_same(tensors(run), tensors(tmp_path / "whole"))
        assert [x.get("loss") for x in lines(run)] == [
            x.get("loss") for x in lines(tmp_path / "whole")
        ]


def test_a_run_with_a_rate_of_its_own_does_not_go_on_with_the_masks(place, mask, tmp_path):
    more = {"epochs": 1, "eval_every": 5}
    with pytest.raises(Interrupted):
        train(place, tmp_path / "run", mask, display=Silent(3, terminate), lr=1e-2, **more)
    with pytest.raises(ConfigError, match="has lr = 0.01 and cannot go on with 0.008"):
        train(place, tmp_path / "run", mask, resume=True, lr=None, **more)


def test_the_run_that_has_the_mask_is_not_overwritten(place, mask, tmp_path):
    train(place, tmp_path / "run", mask, max_steps=1)
    config = config_of(place, tmp_path / "run", tmp_path / "run")
    with pytest.raises(ConfigError, match="mask .* lies in the output"):
        finetune(config, overwrite=True, display=Silent())
    # By a link in it, too, to the whole or to its files.
    own = tmp_path / "run" / "adapter"
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    outer.mkdir()
    (outer / "adapter").symlink_to(own)
    inner.mkdir()
    for path in own.iterdir():
        (inner / path.name).symlink_to(path)
    for linked in (outer, inner):
        config = config_of(place, tmp_path / "run", linked)
        for attempt in (finetune, dry_run):
            with pytest.raises(ConfigError, match="mask .* lies in the output"):
                attempt(config, overwrite=True, display=Silent())
    assert (tmp_path / "run" / "result.json").is_file()


STUDY = """
output: {folder}/study
base: {{model: {place}/model, train: {place}/train.tsv, test: {place}/eval.tsv, validation: 0.25}}
tasks: {{films: {{}}}}
methods: {{ready: {{mask: mask}}}}
lr: 1e-2
"""


def test_a_study_knows_its_mask_again(place, mask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mask, "mask")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(folder=tmp_path, place=place))
    study = read_study(path)
    grid = study.grid()
    ((id, run),) = grid.items()
    config = run.config(tmp_path / "study" / "runs" / id, study.data).located()
    write_result(config, inputs="mask=000000000000")
    row = collect(study)[id]
    assert (row.salience, row.scope) == ("", "")
    stored = json.loads(row.settings)
    assert stored["mask"] == "mask"  # as in the study's file, and not where it lies here
    # What chooses a mask where there is none: of a version with other defaults.
    other = json.dumps({**stored, "salience": "gradient", "density": 0.3, "scope": "global"})
    row = dataclasses.replace(row, settings=other)
    assert changed_settings(study, grid, {id: row}) == []
    assert "mask mask: it was another one" in changed_inputs(study, grid, {id: row})[0]
    path.write_text(path.read_text().replace("lr: 1e-2", ""))
    with pytest.raises(ConfigError, match="method ready: lr is missing"):
        read_study(path)
