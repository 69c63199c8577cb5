"""What a study's file may say, and which runs follow from it."""

import pytest

from speft_kernels.errors import ConfigError
from speft_kernels.finetune.config import RunConfig
from speft_kernels.study.config import read_study

STUDY = """
name: tiny
output: OUTPUT
base: {validation: 0.25, epochs: 1}
tasks:
  films: {train: train.tsv, test: eval.tsv}
methods:
  head: {method: head}
  sparse: {salience: [snip, random]}
lr: [1e-2, 3e-2]
seeds: [0, 1, 2]
"""


@pytest.fixture
def study_file(tmp_path):
    def write(text=STUDY):
        file = tmp_path / "study.yaml"
        file.write_text(text.replace("OUTPUT", str(tmp_path / "out")))
        return file

    return write


def test_lists_span_the_grid_and_ids_name_runs_on_any_machine(study_file, tmp_path):
    study = read_study(study_file())
    assert list(study.methods) == ["head", "sparse-snip", "sparse-random"]
    assert study.rates["head"] == (1e-2, 3e-2)
    ids = [run.id for cell in study.cells for run in study.search(*cell)]
    assert len(set(ids)) == 6
    # Another folder of data and of output, the same runs.
    elsewhere = read_study(study_file(), output=str(tmp_path / "other"), data=str(tmp_path))
    assert [r.id for c in elsewhere.cells for r in elsewhere.search(*c)] == ids
    assert all(run.settings["train"] == "train.tsv" for run in study.search("films", "head"))
    text = STUDY.replace("epochs: 1", "epochs: 2")
    changed = read_study(study_file(text))
    assert not {r.id for c in changed.cells for r in changed.search(*c)} & set(ids)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("methods:\n  head: {method: head}", "methods:\nx:", "key 'x' is unknown"),
        (STUDY[STUDY.index("methods") : STUDY.index("lr:")], "", "methods is empty, so the grid"),
        (STUDY[STUDY.index("tasks") : STUDY.index("methods")], "tasks: {}\n", "tasks is empty"),
        ("[snip, random]", "[]", "salience is an empty list: nothing to run"),
        ("[snip, random]", "[snip, snop]", "unknown salience metric 'snop'"),
        ("[snip, random]", "[snip, snip]", "two methods are called 'sparse-snip'"),
        ("films:", "'../films':", "a label is made of letters"),
        ("lr: [1e-2, 3e-2]", "lr: []", "must be a list of numbers with one at least"),
        ("lr: [1e-2, 3e-2]", "lr: [1e-2, 0.01]", "names a value twice"),
        ("lr: [1e-2, 3e-2]", "lr: [1e-2, -1]", "lr = -1.0 must be greater than 0"),
        ("seeds: [0, 1, 2]", "seeds: [0.5]", "seeds = .0.5. must be a list of numbers"),
        ("seeds: [0, 1, 2]", "search_seeds: 2", "search_seeds = 2 must lie between 1 and 1"),
        ("{method: head}", "{method: head, seeds: []}", "method head: seeds = .. must be"),
        (
            "random]}\nlr:",
            "random], seeds: 7}\nsearch_seeds: 2\nlr:",
            "search_seeds = 2 must lie between 1 and 1",
        ),
        ("seeds: [0, 1, 2]", "search: up", "search = 'up' is not one of all, climb"),
        ("seeds: [0, 1, 2]", "search_slack: -1", "search_slack = -1 must be a number from 0 on"),
        ("seeds: [0, 1, 2]", "seeds: [0, -1]", "run films-head-lr0.01-s-1-.*: seed = -1 must be"),
        ("seeds: [0, 1, 2]", "seeds: [.inf]", "method head: seeds = .inf. must be a list"),
        ("lr: [1e-2, 3e-2]", f"lr: {10**400}", r"method head: lr = 10*\.\.\.0* is too large"),
        ("lr: [1e-2, 3e-2]", "lr: [1_0e-4]", "lr = .'1_0e-4'. must be a list of numbers"),
        ("seeds: [0, 1, 2]", f"seeds: [{10**30}]", r"seeds = .10*. is too large a number"),
        ("epochs: 1", "epochs: '1_0'", "epochs = '1_0' is not a whole number"),
        (
            "seeds: [0, 1, 2]",
            f"search_slack: {10**400}",
            r"search_slack = 10*\.\.\.0* must be a number",
        ),
        ("[snip, random]", "2020-01-01", "method sparse: salience = .*date.* is no text"),
        ("[snip, random]", "!!binary aGk=", "method sparse: salience = b'hi' is no text"),
        ("[snip, random]", "!!set {a}", "method sparse: salience = {'a'} is no text"),
        ("[snip, random]", "&it [*it]", "method sparse: salience = .* is no text"),
        ("[snip, random]", "[{1: 2, b: 3}]", "method sparse: salience = .* is no text"),
        ("{method: head}", "{method: {a: b}}", "method head: method = {'a': 'b'} is no text"),
        ("validation: 0.25", "validation: {a: b}", "base: validation = {'a': 'b'} is no text"),
        ("head: {", f"{101 * 'h'}: {{", "a label is made of letters"),
        ("name: tiny", f"? 0x{'f' * 5000}\n: 1", "key <int of thousands of digits> is unknown"),
        (
            "seeds: [0, 1, 2]",
            f"seeds: [0x{'f' * 5000}]",
            "seeds = <list .* is too large",
        ),
        ("head: {", f"? 0x{'f' * 5000}\n  : {{", "method <int of thousands of digits>: a label"),
        ("name: tiny", "name: [[a], [b]]", "name = .* is no text"),
        ("seeds: [0, 1, 2]", f"seeds: {list(range(20_000))}", "the grid has .*0 runs; 100,000 are"),
        (
            "{salience: [snip, random]}",
            f"{{epochs: &n {list(range(1, 60))}, batch_size: *n, max_steps: *n, max_length: *n}}",
            "method sparse: its lists span 12,117,361 methods; a grid may have 100,000 runs",
        ),
        ("name: tiny", "data: 5", "data = 5 must be the path of a folder"),
        ("name: tiny", "data: ~nosuchuser/x", "data = '~nosuchuser/x' is no path"),
        ("OUTPUT", "[a]", "output = .'a'. must be the path of a folder"),
        ("OUTPUT", "~nosuchuser/x", "output = '~nosuchuser/x' is no path"),
        ("OUTPUT", '"a\\0b"', "output = 'a.*b' is no path: .* null byte"),
        ("OUTPUT", 256 * "x", "output = 'x*' is no path: it is too long"),
        ("OUTPUT", f"{__file__}/out", "output = .* cannot be a folder: .*py is a file"),
        ("epochs: 1", "epoch: 1", "setting 'epoch' is unknown. Did you mean 'epochs'"),
        ("epochs: 1", "seed: 1", "'seed' is set by the study itself"),
        ("validation: 0.25", "clip: 1", "validation .or eval. is missing"),
        (", test: eval.tsv", "", "test, the data to report on, is missing"),
        ("output: OUTPUT", "", "output, the study's folder, is missing"),
        ("name: tiny", "name: [", "cannot be read as YAML"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(study_file, tmp_path, old, new, message):
    assert old in STUDY
    with pytest.raises(ConfigError, match=message):
        read_study(study_file(STUDY.replace(old, new)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"salience": "snip"}, {"method": "lora"}, {"method": "head"}]
)
def test_without_a_rate_a_method_takes_that_of_a_single_run(study_file, settings):
    text = STUDY.replace("lr: [1e-2, 3e-2]\n", "").replace("{method: head}", str(settings))
    alone = RunConfig(train="-", output="-", **settings).learning_rate
    assert read_study(study_file(text)).rates["head"] == (alone,)


def test_tasks_that_take_several_rates_by_themselves_need_one_to_be_named(study_file):
    text = STUDY.replace(
        "tasks:", "tasks:\n  talk: {train: t.tsv, test: e.tsv, salience: snip}"
    ).replace("head: {method: head}", "sparse: {}")
    text = text.replace("  sparse: {salience: [snip, random]}\n", "")
    rates = "lr is missing, and it is 0.002 on talk, 0.008 on films by default"
    with pytest.raises(ConfigError, match=f"method sparse: {rates}"):
        read_study(study_file(text.replace("lr: [1e-2, 3e-2]\n", "")))
    assert read_study(study_file(text)).rates["sparse"] == (1e-2, 3e-2)
