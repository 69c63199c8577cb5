import csv
import gzip
import json
import os
import re
from pathlib import Path

import pytest
from tiny_text import write_jsonl, write_tsv

from speft_kernels.errors import DataError
from speft_kernels.finetune.data import (
    check_columns,
    check_labels,
    label_ids,
    read_examples,
)


def read(path, task="classification"):
    return read_examples(str(path), task)


def test_tsv_keeps_quotes_and_odd_line_separators(tmp_path):
    texts = ['he said "no', "a\x85b\u2028c", "tab-free, comma"]
    path = write_tsv(tmp_path / "a.tsv", [(text, "1") for text in texts])
    examples = read(path)
    assert [row.texts for row in examples.rows] == [(text,) for text in texts]
    assert [row.line for row in examples.rows] == [2, 3, 4]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_the_line_ends_of_old_macs_are_read_where_there_are_no_others(tmp_path, name):
    texts = ["one", "two", "three"]
    if name == "a.jsonl":
        lines = [f'{{"sentence": "{text}", "label": 1}}' for text in texts]
    else:
        separator = "\t" if name == "a.tsv" else ","
        lines = [separator.join(row) for row in [("sentence", "label"), *((t, "1") for t in texts)]]
    path = tmp_path / name
    path.write_bytes("\r".join([*lines, ""]).encode())
    rows = read(path).rows
    assert [row.texts for row in rows] == [(text,) for text in texts]
    assert [row.line for row in rows] == ([1, 2, 3] if name == "a.jsonl" else [2, 3, 4])


@pytest.mark.parametrize("indent", [None, 1])
def test_json_may_be_one_array_as_well_as_lines(tmp_path, indent):
    rows = [{"sentence": f"one, [two], {n}\n", "label": n % 2} for n in range(3)]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent) + "\n")
    examples = read(path)
    assert [row.texts for row in examples.rows] == [(row["sentence"],) for row in rows]
    assert [row.label for row in examples.rows] == ["0", "1", "0"]
    assert [row.line for row in examples.rows] == ([2] * 3 if indent is None else [3, 7, 11])
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row.line for row in read(path).rows] == [1, 2, 3]


def test_a_carriage_return_is_a_part_of_a_text_where_newlines_end_the_lines(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", [("one\rtwo", "1")])
    assert read(path).rows[0].texts == ("one\rtwo",)


def test_csv_follows_quotes_over_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    rows = [['one, "two"\nthree', "x"], ["plain", "y"]]
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["sentence", "label"], *rows])
    examples = read(path)
    assert [(row.texts[0], row.label) for row in examples.rows] == [tuple(row) for row in rows]
    assert [row.line for row in examples.rows] == [2, 4]


def test_a_long_csv_field_is_read_and_the_module_limit_restored(tmp_path):
    limit = csv.field_size_limit()
    path = tmp_path / "long.csv"
    path.write_text(f"sentence,label\n{'w ' * limit},1\n", "utf-8")
    assert len(read(path).rows[0].texts[0]) == 2 * limit
    assert csv.field_size_limit() == limit


def test_json_lines_with_numbers_and_booleans_as_labels(tmp_path):
    records = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": True}]
    examples = read(write_jsonl(tmp_path / "a.jsonl", records))
    assert [row.label for row in examples.rows] == ["1", "true"]


def test_pairs_are_preferred_to_a_single_column(tmp_path):
    header = "sentence\tsentence1\tsentence2\tlabel"
    path = write_tsv(tmp_path / "a.tsv", [("s", "a", "b", "1")], header)
    assert read(path).columns == ("sentence1", "sentence2")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("prompt", "response"), ("p", "r")),
        (("query", "response"), ("p", "r")),
        (("question", "answer"), ("p", "r")),
        (("text", "source"), ("p",)),
    ],
)
def test_causal_lm_columns(tmp_path, columns, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [dict(zip(columns, "pr", strict=True))])
    assert read(path, "causal-lm").rows[0].texts == expected


def test_a_part_of_a_dataset_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    row = {"type": "t", "query": "q", "original_question": "o", "response": "r"}

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([row] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = read("meta-math/MetaMathQA:train[:100000]", "causal-lm")
    assert asked == [("meta-math/MetaMathQA", None, "train[:100000]")]
    assert [row.texts for row in examples.rows] == [("q", "r")] * 3


def test_numeric_labels_are_sorted_as_numbers(tmp_path):
    rows = [("a", label) for label in ("10", "9", "-1", "9")]
    examples = read(write_tsv(tmp_path / "a.tsv", rows))
    assert label_ids(examples) == {"-1": 0, "9": 1, "10": 2}


@pytest.mark.parametrize("odd", ["--5", "5-", "\u00b2", "5" * 5000])
def test_labels_are_text_where_one_is_no_number(tmp_path, odd):
    examples = read(write_tsv(tmp_path / "a.tsv", [("a", label) for label in ("10", "9", odd)]))
    assert label_ids(examples) == {label: n for n, label in enumerate(sorted(("10", "9", odd)))}


def test_labels_of_one_number_keep_their_order(tmp_path):
    zeros = ["0" * n + "1" for n in range(8, -1, -1)]
    examples = read(write_tsv(tmp_path / "a.tsv", [("a", label) for label in ("2", *zeros)]))
    assert list(label_ids(examples)) == [*zeros, "2"]


@pytest.mark.parametrize("name", ["sst2", "cola", "mrpc"])
def test_real_classification_files_are_read_whole(data_dir, name):
    train = data_dir / name / "train.tsv"
    examples = read(train)
    assert len(examples) == train.read_bytes().count(b"\n") - 1
    assert set(label_ids(examples)) == {"0", "1"}
    held_out = read(data_dir / name / ("test.tsv" if name == "mrpc" else "dev.tsv"))
    check_labels(held_out, label_ids(examples))
    check_columns(held_out, examples)


def test_real_language_modelling_files_are_read_whole(data_dir):
    path = data_dir / "gsm8k" / "train.jsonl"
    examples = read(path, "causal-lm")
    assert examples.columns == ("question", "answer")
    assert len(examples) == path.read_bytes().count(b"\n")


GOOD = "sentence\tlabel\nfine words\t1\n"
BROKEN = {
    "empty": ("a.tsv", b"", ["the file is empty", "must name the columns"]),
    "blank": ("a.tsv", b"\n \n", ["the file is empty"]),
    "header only": ("a.tsv", b"sentence\tlabel\n", ["header but no rows"]),
    "wrong columns": (
        "a.tsv",
        b"sentense\tlabel\na\t1\n",
        ["'sentense', 'label'", "Did you mean 'sentence'?"],
    ),
    "no label": (
        "a.tsv",
        b"sentence\tlable\na\t1\n",
        ["needs the column 'label'. Found: 'sentence', 'lable'. Column 'lable': Did", "'label'?"],
    ),
    "no text": (
        "a.tsv",
        b"question\tlabel\na\t1\n",
        [
            "needs one of these: 'sentence1' and 'sentence2'; 'premise' and 'hypothesis'; "
            "'question1' and 'question2'; 'question' and 'sentence'; 'sentence'; 'text'. "
            "Found: 'question', 'label'."
        ],
    ),
    "many columns": ("a.tsv", b"\t".join(b"c%d" % i for i in range(5000)), ["and 4980 more"]),
    "many repeated columns": (
        "a.tsv",
        b"\t".join(b"c%d" % (i % 50_000) for i in range(100_000)),
        ["names 'c0', 'c1'", "and 49980 more twice"],
    ),
    "a long column": ("a.tsv", b"x" * 100_000 + b"\tlabel\n", ["xxx...xxx"]),
    "a long label": ("a.jsonl", b'{"sentence": "a", "label": [%s1]}' % (b"1," * 9999), ["'label'"]),
    "a long text": ("a.jsonl", b'{"sentence": [%s1], "label": 1}' % (b"1," * 9999), ["not text"]),
    "latin-1": (
        "a.tsv",
        b"sentence\tlabel\nok\t1\ncaf\xe9\t0\n",
        ["line 3", "byte 0xe9 at offset 23", "not UTF-8", "iconv"],
    ),
    "utf-16": (
        "a.tsv",
        b"\xff\xfe" + GOOD.encode("utf-16-le"),
        ["UTF-16", "read as UTF-8", "iconv"],
    ),
    "utf-16, the other": ("a.csv", b"\xfe\xff" + GOOD.encode("utf-16-be"), ["is UTF-16 text"]),
    "gzip": ("a.tsv", gzip.compress(GOOD.encode()), ["is compressed with gzip", "gzip -dc"]),
    "zip": ("a.csv", b"PK\x03\x04\x14\0", ["is a zip archive or an Excel file"]),
    "parquet": ("a.jsonl", b"PAR1\x15\x04\x15PAR1", ["is a Parquet file", "as JSON lines"]),
    "too few fields": ("a.tsv", b"sentence\tlabel\na\t1\nb\n", ["line 3: 1 field(s)", "names 2"]),
    "too many fields": ("a.csv", b"sentence,label\na,b,1\n", ["line 2: 3 field(s)"]),
    "open quote": ("a.csv", b'sentence,label\n"a,1\n', ["broken CSV", "inner quotes doubled"]),
    "repeated column": ("a.tsv", b"label\tsentence\tlabel\n1\ta\t1\n", ["'label' twice"]),
    "bad json": ("a.jsonl", b'{"sentence": "a", "label": 1}\n{"sen\n', ["line 2", "valid JSON"]),
    "bad json's column": (
        "a.jsonl",
        b'{"sentence": }\n',
        ["line 1", "Expecting value, column 14)"],
    ),
    "json list": ("a.jsonl", b'["a"]\n', ["line 1: holds a list"]),
    "no objects in an array": (
        "a.json",
        b'[\n{"sentence": "a", "label": 1},\n "b"]',
        ["line 3: holds a str"],
    ),
    "missing key in an array": (
        "a.json",
        b'[{"sentence": "a", "label": 1},\n\n  {"label": 1}]',
        ["line 3: 'sentence' is missing"],
    ),
    "bad array": ("a.json", b'[{"sentence": "a"}\n{}]', ["valid JSON", "line 2 column 1"]),
    "no end of an array": ("a.json", b'[{"sentence": "a", "label": 1},', ["valid JSON"]),
    "empty array": ("a.json", b"[]", ["Found: none"]),
    "array too deep": ("a.json", b"[" * 100_000, ["valid JSON"]),
    "semicolons": ("a.csv", b"sentence;label\na;1\n", ["parted by ';'", "by commas in a .csv"]),
    "tabs in a csv": ("a.csv", b"sentence\tlabel\na\t1\n", ["parted by '\\t'", "by tabs"]),
    "missing key": (
        "a.jsonl",
        b'{"sentence": "a", "label": 1}\n{"label": 1}\n',
        ["line 2: 'sentence' is missing"],
    ),
    "number as text": ("a.jsonl", b'{"sentence": 5, "label": 1}\n', ["line 1: 'sentence' is 5"]),
    "fraction as label": ("a.jsonl", b'{"sentence": "a", "label": 0.5}\n', ["'label' is 0.5"]),
    "half a surrogate": (
        "a.jsonl",
        b'{"sentence": "\\ud800", "label": 1}\n',
        ["line 1", "surrogate"],
    ),
    "nested too deep": (
        "a.jsonl",
        b'{"sentence": "a", "label": 1}\n{"sentence": ' + b"[" * 100_000 + b"\n",
        ["line 2", "valid JSON"],
    ),
    "half a surrogate as label": (
        "a.jsonl",
        b'{"sentence": "a", "label": "\\udfff"}\n',
        ["line 1: 'label'", "surrogate"],
    ),
    "empty label": ("a.tsv", b"sentence\tlabel\na\t\n", ["line 2: the label is empty"]),
    "empty texts": ("a.tsv", b"sentence\tlabel\n\t1\n \t0\n", ["'sentence' is empty in every row"]),
    "unknown type": ("a.xlsx", b"x", ["type .xlsx", ".tsv"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_place_and_remedy(tmp_path, case):
    name, content, parts = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", "1")])
    with pytest.raises(DataError, match=r"no such file.*Did you mean 'train.tsv'"):
        read(tmp_path / "trian.tsv")
    with pytest.raises(DataError, match="folder .* does not exist either"):
        read(tmp_path / "nowhere" / "train.tsv")
    with pytest.raises(DataError, match=r"is a folder.*'train.tsv'"):
        read(tmp_path)


def test_a_pipe_is_no_file_that_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(DataError, match="pipe.tsv is a pipe or a device, and data are read more"):
        read(tmp_path / "pipe.tsv")


def test_a_folder_that_may_not_be_entered_is_said_so(tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", closed)  # root may enter all of them
    with pytest.raises(DataError, match="a.tsv: cannot be read: Permission denied"):
        read(tmp_path / "a.tsv")


def test_causal_lm_names_its_own_columns(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"promt": "a", "response": "b"}])
    with pytest.raises(DataError, match=r"'prompt' and 'response'.*Did you mean 'prompt'"):
        read(path, "causal-lm")


def test_a_dataset_name_without_network_says_so():
    with pytest.raises(DataError, match="neither a file here nor a dataset that could be fetched"):
        read("surely-no-such-dataset-here")


def test_one_label_only_is_nothing_to_learn(tmp_path):
    examples = read(write_tsv(tmp_path / "a.tsv", [("a", "1"), ("b", "1")]))
    with pytest.raises(DataError, match="every row has the label '1'"):
        label_ids(examples)


def test_an_unknown_label_in_eval_is_named_with_its_line(tmp_path):
    train = read(write_tsv(tmp_path / "a.tsv", [("a", "good"), ("b", "bad")]))
    held_out = read(write_tsv(tmp_path / "b.tsv", [("a", "good"), ("b", "goood")]))
    message = (
        "line 3: label 'goood' does not occur in the training data (its labels: 'bad', 'good')"
    )
    with pytest.raises(DataError, match=re.escape(message) + r".*Did you mean 'good'"):
        check_labels(held_out, label_ids(train))


def test_long_labels_are_not_shown_whole(tmp_path):
    train = read(write_tsv(tmp_path / "a.tsv", [("a", str(n) * 5000) for n in range(1, 100)]))
    held_out = read(write_tsv(tmp_path / "b.tsv", [("a", "1" * 5001)]))
    with pytest.raises(DataError, match="and 79 more") as caught:
        check_labels(held_out, label_ids(train))
    assert len(str(caught.value)) < 5000


def test_the_two_sides_must_have_the_same_columns(tmp_path):
    train = read(write_tsv(tmp_path / "a.tsv", [("a", "1")]))
    pair = write_tsv(tmp_path / "b.tsv", [("a", "b", "1")], "sentence1\tsentence2\tlabel")
    with pytest.raises(DataError, match="'sentence1', 'sentence2'"):
        check_columns(read(pair), train)


def test_the_fingerprint_sees_every_change(tmp_path):
    def of(rows):
        return read(write_tsv(tmp_path / "a.tsv", rows)).fingerprint()

    rows = [("a", "1"), ("b", "0")]
    assert of(rows) == of(list(rows))
    assert len({of(rows), of(rows[::-1]), of([("a", "1"), ("b", "1")]), of([("a b", "1")])}) == 4
