"""What to train for: how a task's examples become batches, its loss, and its metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, nearest, shown
from . import chat
from .batches import Batch
from .data import Example, Examples

IGNORED = -100  # label of a token that is not part of the loss


@dataclass(frozen=True)
class Encoded:
    """One example as token ids; `labels` is a class number, or one target for each token.

    `cut` says that a response lost its end.
    """

    inputs: dict[str, list[int]]
    labels: int | list[int]
    cut: bool = False

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


class Task(Protocol):
    """The parts of training that differ between classification and language modelling."""

    def encode(self, examples: Examples) -> list[Encoded]: ...

    def collate(self, encoded: Sequence[Encoded]) -> Batch: ...

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Sum of the losses over the batch's items (a scalar), and predictions `[batch]` if any."""

    def count(self, inputs: Mapping[str, Tensor]) -> int:
        """Number of items that the batch's loss sums over."""

    def metrics(
        self, total: float, count: int, predicted: list[int], true: list[int]
    ) -> dict[str, float]: ...


class Classification:
    """One label for a sentence or a pair of sentences; of two, F1 is that of `positive`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label_ids: Mapping[str, int],
        max_length: int,
        positive: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.label_ids = label_ids
        self.max_length = max_length
        self.positive = positive

    def encode(self, examples: Examples) -> list[Encoded]:
        columns = zip(*(row.texts for row in examples.rows), strict=True)
        texts = [list(column) for column in columns]
        ids = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return [
            Encoded({key: ids[key][i] for key in ids}, self.label_ids[str(row.label)])
            for i, row in enumerate(examples.rows)
        ]

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        inputs = pad(encoded, self.tokenizer)
        inputs["labels"] = torch.tensor([item.labels for item in encoded])
        return Batch(inputs, self.count(inputs), sum(item.length for item in encoded))

    def count(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs["labels"].numel()

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        features = {key: tensor for key, tensor in inputs.items() if key != "labels"}
        logits = model(**features).logits.float()
        loss = functional.cross_entropy(logits, inputs["labels"], reduction="sum")
        return loss, logits.detach().argmax(-1)

    def metrics(
        self, total: float, count: int, predicted: list[int], true: list[int]
    ) -> dict[str, float]:
        positive = 1 if self.positive is None else self.label_ids[self.positive]
        scores = classification_scores(predicted, true, len(self.label_ids), positive)
        return {**scores, "loss": total / count}


class CausalLM:
    """The next token; where an example has a prompt, only its response is learnt, and only the last
    reply of a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def encode(self, examples: Examples) -> list[Encoded]:
        """Examples whose response is wholly cut off by `max_length` are left out.

        Raises DataError when none is left, or the model's chat template refuses a conversation.
        """
        parts = self._messages if examples.columns == ("messages",) else self._texts
        divided = (parts(examples.source, row) for row in examples.rows)
        encoded = [item for pair in divided if (item := self._cut(*pair)) is not None]
        if not encoded:
            raise DataError(
                f"{examples.source}: max_length = {self.max_length} leaves no token to learn of "
                "any example; raise --max-length"
            )
        return encoded

    def _messages(self, source: str, row: Example) -> tuple[list[int], list[int]]:
        try:
            return chat.encode(self.tokenizer, row.texts[0])
        except ValueError as error:
            raise DataError(f"{source}, line {row.line}: 'messages' {error}") from error

    def _texts(self, source: str, row: Example) -> tuple[list[int], list[int]]:
        *prompt, response = row.texts
        # An instruction may come with an input to it, or with an empty one.
        text = "".join(part + "\n" for part in prompt if part)
        before = self.tokenizer(text).input_ids if prompt else []
        if before and before[-1] == self.tokenizer.eos_token_id:
            before = before[:-1]
        after = self.tokenizer(response, add_special_tokens=not prompt).input_ids
        if self.tokenizer.eos_token_id is not None and after[-1:] != [self.tokenizer.eos_token_id]:
            after = [*after, self.tokenizer.eos_token_id]
        return before, after

    def _cut(self, before: list[int], after: list[int]) -> Encoded | None:
        ids = (before + after)[: self.max_length]
        labels = ([IGNORED] * len(before) + after)[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            return None
        cut = len(ids) < len(before) + len(after)
        return Encoded({"input_ids": ids, "attention_mask": [1] * len(ids)}, labels, cut)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        inputs = pad(encoded, self.tokenizer)
        width = inputs["input_ids"].shape[1]
        labels = [[*_targets(item), *[IGNORED] * (width - item.length)] for item in encoded]
        inputs["labels"] = torch.tensor(labels)
        return Batch(inputs, self.count(inputs), sum(item.length for item in encoded))

    def count(self, inputs: Mapping[str, Tensor]) -> int:
        return int((inputs["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
        )
        targets = inputs["labels"][:, 1:]
        learnt = targets != IGNORED
        logits = output.logits[:, :-1][learnt].float()
        return functional.cross_entropy(logits, targets[learnt], reduction="sum"), None

    def metrics(
        self, total: float, count: int, predicted: list[int], true: list[int]
    ) -> dict[str, float]:
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _targets(item: Encoded) -> list[int]:
    assert isinstance(item.labels, list)
    return item.labels


def pad(encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pads on the right to the longest example: ids with the padding token, the rest with 0."""
    width = max(item.length for item in encoded)
    padded = {}
    for key in encoded[0].inputs:
        fill = tokenizer.pad_token_id if key == "input_ids" else 0
        rows = [item.inputs[key] + [fill] * (width - item.length) for item in encoded]
        padded[key] = torch.tensor(rows)
    return padded


def classification_scores(
    predicted: Sequence[int], true: Sequence[int], num_labels: int, positive: int = 1
) -> dict[str, float]:
    """Accuracy; for two labels also F1 of `positive` and Matthews' correlation coefficient.

    Both are 0 where their denominator is (no positive at all, or only one label predicted).
    """
    pairs = Counter(zip(predicted, true, strict=True))
    scores = {"accuracy": sum(pairs[n, n] for n in range(num_labels)) / len(true)}
    if num_labels == 2:
        yes, no = positive, 1 - positive
        tp, tn, fp, fn = pairs[yes, yes], pairs[no, no], pairs[yes, no], pairs[no, yes]
        scores["f1"] = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        scores["matthews"] = (tp * tn - fp * fn) / spread if spread else 0.0
    return scores


def majority_scores(
    train: Iterable[int], held_out: Sequence[int], num_labels: int, positive: int = 1
) -> dict[str, float]:
    """What `classification_scores` gives on `held_out` to the most frequent class of `train`."""
    answer, _ = Counter(train).most_common(1)[0]
    return classification_scores([answer] * len(held_out), held_out, num_labels, positive)


def positive_label(wanted: str | None, labels: Sequence[str]) -> str | None:
    """The label that F1 is of: the one that is wanted, else the second of two.

    Raises ConfigError where there are not two labels or none of that name.
    """
    if wanted is None:
        return labels[1] if len(labels) == 2 else None
    if len(labels) != 2:
        raise ConfigError(
            f"positive_label = {shown(wanted)} is for two labels and the training data has "
            f"{len(labels)}; leave it out"
        )
    if wanted not in labels:
        raise ConfigError(
            f"positive_label = {shown(wanted)} does not occur in the training data (its labels: "
            f"{', '.join(map(shown, labels))}).{nearest(wanted, labels)}"
        )
    return wanted


def check_metric(metric: str, num_labels: int) -> None:
    """Raises ConfigError for a metric that needs two labels when there are more."""
    if metric in ("f1", "matthews") and num_labels != 2:
        raise ConfigError(
            f"metric {metric!r} is for two labels and the training data has {num_labels}; "
            "use --metric accuracy"
        )
