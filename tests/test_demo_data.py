import string
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speft_kernels.errors import DataError
from speft_kernels.finetune.demo_data import (
    SAME_SHINGLES,
    clean,
    collect,
    near_duplicate_groups,
    shingle_set,
    split,
)


@pytest.fixture(scope="module")
def data():
    return collect()


def similarity(first, second):
    a, b = shingle_set(first), shingle_set(second)
    return len(a & b) / len(a | b)


def test_the_set_of_this_interpreter(data):
    examples = data.train + data.eval + data.test
    assert len(data.labels) <= 16
    assert {example.label for example in examples} == set(data.labels)
    assert "test" not in data.labels
    sizes = Counter(example.label for example in examples)
    assert list(data.labels) == sorted(sizes, key=lambda name: (-sizes[name], name))
    if len(data.labels) < 16:
        pytest.skip("this interpreter comes with part of the standard library")
    assert 2500 <= len(examples) <= 6000
    assert 0.15 <= len(data.test) / len(examples) <= 0.25
    assert 0.06 <= len(data.eval) / len(examples) <= 0.14


def test_no_text_names_its_package(data):
    for example in data.train + data.eval + data.test:
        words = "".join(
            c if c in string.ascii_letters + string.digits + "_" else " "
            for c in example.text.lower()
        ).split()
        assert example.label not in words


def test_no_near_duplicates_across_the_split(data):
    sides = [data.train, data.eval, data.test]
    owners: dict[tuple[str, str], set[tuple[int, str]]] = {}
    for side, examples in enumerate(sides):
        for example in examples:
            for shingle in shingle_set(example.text):
                owners.setdefault(shingle, set()).add((side, example.text))
    compared = 0
    for sharing in owners.values():
        held_out = [text for side, text in sharing if side != 0][:200]
        for text in held_out:
            for other_side, other in sharing:
                if other_side == 0:
                    compared += 1
                    assert similarity(text, other) < SAME_SHINGLES, (text, other)
    assert compared > 10_000 or len(data.labels) < 16


def test_every_text_once_and_with_one_label(data):
    texts = [e.text.lower() for side in (data.train, data.eval, data.test) for e in side]
    assert len(texts) == len(set(texts))


def test_the_split_is_the_same_whatever_the_order(data):
    examples = list(data.train + data.eval + data.test)
    again = split(examples[::-1])
    for side, other in zip((data.train, data.eval, data.test), again, strict=True):
        assert set(side) == set(other)


sentence = st.lists(
    st.sampled_from(["get", "set", "the", "a", "node", "tree", "of", "value"]),
    min_size=3,
    max_size=8,
)


@given(st.lists(sentence.map(" ".join), min_size=2, max_size=25, unique=True))
def test_similar_texts_are_always_in_one_group(texts):
    groups = near_duplicate_groups(texts)
    assert sorted(index for group in groups for index in group) == list(range(len(texts)))
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    for first in range(len(texts)):
        for second in range(first):
            if similarity(texts[first], texts[second]) >= SAME_SHINGLES:
                assert group_of[first] == group_of[second]
    for group in groups:  # and every member has a neighbour in its group
        for index in group if len(group) > 1 else []:
            assert any(
                similarity(texts[index], texts[other]) >= SAME_SHINGLES
                for other in group
                if other != index
            )


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("Send an email now.\n\nMore.", "Send an now."),
        ("email.message: what it\nis made   of.", ": what it is made of."),
        ("Emails of the EMAIL kind", "Emails of the kind"),
        ("\n    indented\n      text\n    \n    not this", "indented text"),
        ("the _email and e_mail names", "the _ and e_mail names"),
    ],
)
def test_the_first_paragraph_without_the_packages_name(docstring, text):
    assert clean(docstring, "email") == text


def test_ambiguous_and_tiny_texts_are_left_out(tmp_path):
    for package in ("alpha", "beta"):
        folder = tmp_path / package
        folder.mkdir()
        functions = "".join(
            f'def f{n}():\n    """Turn the {package[0]}{n} number {n * n} over."""\n'
            for n in range(12)
        )
        shared = 'def same():\n    """Return what everyone returns."""\n'
        tiny = 'def tiny():\n    """Too short."""\n'
        (folder / "__init__.py").write_text(functions + shared + tiny)
    (tmp_path / "alpha" / "broken.py").write_text("def (:\n")
    (tmp_path / "alpha" / "latin.py").write_bytes(b'"""caf\xe9 is no UTF-8 here"""\n')
    (tmp_path / "single.py").write_text('"""A module is no package here."""\n')
    data = collect(tmp_path)
    texts = [e.text for side in (data.train, data.eval, data.test) for e in side]
    assert len(texts) == 24
    assert not any("everyone" in text or "short" in text for text in texts)
    assert data.labels == ("alpha", "beta")


def test_an_interpreter_without_sources_is_told_what_to_do(tmp_path):
    (tmp_path / "email").mkdir()
    with pytest.raises(DataError, match="--train and --eval"):
        collect(tmp_path)


def test_shingles_mark_the_ends_and_ignore_case():
    assert shingle_set("Get it.") == set(pairwise(("", "get", "it", "")))
