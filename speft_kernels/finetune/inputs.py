"""Everything a run reads, loaded and checked before anything is written."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from .._version import __version__
from ..errors import ConfigError
from ..experts import split_experts
from ..salience.accumulate import LossFn
from ..salience.custom import source_of
from ..targets import Targets
from . import methods
from .config import RunConfig
from .data import (
    Examples,
    check_columns,
    check_labels,
    label_ids,
    read_examples,
    split_off,
)
from .display import Display
from .mask import Mask, rated, read_mask
from .models import (
    folder_or_id,
    labels_of_head,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    pooling_of,
)
from .signals import StopSignals
from .tasks import CausalLM, Classification, Encoded, Task, check_metric, positive_label

# The sources of a run's data, and which split of a dataset each is by default.
SPLITS = {"train": "train", "eval": "validation", "test": "test"}
_DIGITS = 12
# What models call the embedding of absolute positions.
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")


@dataclass(frozen=True)
class Inputs:
    """The data as token ids, the model, and what the settings mean for it.

    `config` says what its `lora_budget` means for this model (see `methods.budgeted`), and which
    learning rate goes with its `mask`. `labels` are the class names in the order of the model's
    outputs, `positive_label` is the one of two that F1 is of; `pooling` is "mean" or "model", and
    None for a language model; `fingerprint` covers all the data, as token ids too, the base
    weights, a score of the user's own and a ready mask: what a run that goes on must find as it
    was. `identity` has a digest of each source, of the base weights, of the file of a score of the
    user's own and of a ready mask, "train=DIGITS test=DIGITS model=DIGITS salience=DIGITS
    mask=DIGITS".
    """

    config: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    targets: Targets
    mask: Mask | None
    train: list[Encoded]
    eval: list[Encoded]
    test: list[Encoded] | None
    labels: tuple[str, ...]
    positive_label: str | None
    pooling: str | None
    fingerprint: str
    identity: str

    def about(self) -> dict[str, Any]:
        """What is needed beside the trained tensors to build the model again."""
        about: dict[str, Any] = {
            "speft_kernels": __version__,
            "task": self.config.task,
            "model": self.config.model,
            "labels": list(self.labels),
            "positive_label": self.positive_label,
            "pooling": self.pooling,
            "max_length": self.config.max_length,
        }
        if self.mask is not None:
            # Not its path, which is of one machine: adapters are passed on.
            about["mask"] = {"sha256": self.mask.sha256}
        return about

    def scoring(
        self, accelerator: Accelerator, stop: StopSignals, count: int = 0
    ) -> tuple[ScoringBatches, LossFn]:
        """The batches of the `count`-th choice of the mask, other examples for each; their loss."""
        batches = ScoringBatches(self.task, self.train, self.config, stop, count)
        return batches, methods.mean_loss(self.task, accelerator)


class ScoringBatches:
    """The batches that salience is taken from; they can be gone through several times.

    A random choice of the training data by the run's seed and `count`. Raises Interrupted between
    two batches when a signal has arrived.
    """

    def __init__(
        self,
        task: Task,
        train: list[Encoded],
        config: RunConfig,
        stop: StopSignals,
        count: int,
    ) -> None:
        # The seed of the training's first order, too: with the 0 the first pool of batches has the
        # examples of the first choice. Another one would draw other examples than recorded runs.
        generator = torch.Generator().manual_seed((config.seed + 1_000_003 * count) % 2**63)
        order = torch.randperm(len(train), generator=generator, device="cpu")
        chosen = order[: config.scoring_examples]
        parts = min(config.scoring_batches, len(chosen))
        if parts < len(chosen) < 2 * parts:
            # A batch counts by its mean: of one example and of two, the one would count twice.
            parts = len(chosen) // 2
        self._parts = [part.tolist() for part in chosen.tensor_split(parts)]
        self._task, self._train, self._stop = task, train, stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for part in self._parts:
            self._stop.check()
            yield self._task.collate([self._train[i] for i in part]).inputs


@dataclass(frozen=True)
class Sources:
    """The data by their names in `SPLITS`: `given` as they were read, `used` with the eval data
    split off where the settings say so; `labels` has the number of each class by the data alone,
    `positive_label` is the one of two that F1 is of.
    """

    given: dict[str, Examples]
    used: dict[str, Examples]
    labels: dict[str, int]
    positive_label: str | None


def read_sources(config: RunConfig) -> Sources:
    """Reads the data and checks them against each other, without a model.

    With neither `config.eval` nor `validation` there is no eval data.

    Raises:
        DataError: the data cannot be used.
        ConfigError: the settings do not fit them.
    """
    given = {name: read_source(config, name) for name in SPLITS if getattr(config, name)}
    train = given["train"]
    for source in given.values():
        check_columns(source, train)
    used = dict(given)
    if config.validation:
        used["train"], used["eval"] = split_off(train, config.validation)
    labels: dict[str, int] = {}
    positive = None
    if config.task == "classification":
        labels = label_ids(train)
        for source in used.values():
            check_labels(source, labels)
        check_metric(config.metric_name, len(labels))
        positive = positive_label(config.positive_name, tuple(labels))
    return Sources(given, used, labels, positive)


def load_model(
    config: RunConfig,
    labels: Sequence[str],
    mask: Mask | None,
    tokenizer: PreTrainedTokenizerBase,
    display: Display,
) -> tuple[PreTrainedModel, Targets, RunConfig, tuple[str, ...]]:
    """The model, what of it is adapted, `config` with its budget and the mask's learning rate in
    numbers, and `labels` in the order of the model's outputs (see `labels_of_head`).

    The model's new head, if any, is drawn from torch's global generator; `display` is told where
    one takes the place of another. Raises ConfigError, and AdapterError for a mask of another
    model.
    """
    if config.task == "causal-lm":
        model = load_causal_lm(config.model)
        ordered: tuple[str, ...] = ()
    else:
        ordered, note = labels_of_head(config.model, labels, config.pooling)
        if note:
            display.note(note)
        model = load_classifier(
            config.model,
            ordered,
            pooling=config.pooling,
            tokenizer=tokenizer,
            new_head=bool(note),
        )
    check_weights(model, config.model)
    if config.experts == "split":
        split_experts(model)
    targets = methods.find(model, config, mask)
    config = rated(methods.budgeted(config, targets), mask)
    check_rank(config, targets)
    return model, targets, config, ordered


def read_inputs(config: RunConfig, display: Display) -> Inputs:
    """Loads data and model; see `read_mask`, `read_sources` and `load_model`, also for what they
    raise.
    """
    return with_model(config, read_sources(config), read_mask(config), display)


def with_model(config: RunConfig, sources: Sources, mask: Mask | None, display: Display) -> Inputs:
    """`sources` as the model's tokens, and the model; raises as `read_inputs` does."""
    tokenizer = load_tokenizer(config.model)
    model, targets, config, labels = load_model(
        config, tuple(sources.labels), mask, tokenizer, display
    )
    pooling = None
    task: Task = CausalLM(tokenizer, config.max_length)
    if config.task == "classification":
        pooling = pooling_of(config.model, config.pooling)
        numbers = {label: number for number, label in enumerate(labels)}
        task = Classification(tokenizer, numbers, config.max_length, sources.positive_label)
    encoded = {name: encode(task, source, display) for name, source in sources.used.items()}
    check_fit(model, tokenizer, sources.used, encoded)
    identity = {name: source.fingerprint()[:_DIGITS] for name, source in sources.given.items()}
    identity.update({name: digest_of(config, name) for name in ("model", "salience")})
    # Of what was read: another run may be writing there.
    identity["mask"] = "" if mask is None else mask.sha256[:_DIGITS]
    fingerprint = hashlib.sha256("".join(identity.values()).encode())
    if labels != tuple(sources.labels):
        fingerprint.update("\0".join(labels).encode())
    for name, source in sources.used.items():
        fingerprint.update(source.fingerprint().encode())
        for item in encoded[name]:  # as the tokenizer makes them
            fingerprint.update(array("q", item.inputs["input_ids"]).tobytes())
    return Inputs(
        config=config,
        task=task,
        tokenizer=tokenizer,
        model=model,
        targets=targets,
        mask=mask,
        train=encoded["train"],
        eval=encoded.get("eval", []),
        test=encoded.get("test"),
        labels=labels,
        positive_label=sources.positive_label,
        pooling=pooling,
        fingerprint=fingerprint.hexdigest(),
        identity=" ".join(f"{name}={digits}" for name, digits in identity.items() if digits),
    )


def read_source(config: RunConfig, name: str) -> Examples:
    """The "train", "eval" or "test" data. Raises DataError as `read_examples` does."""
    return read_examples(getattr(config, name), config.task, default_split=SPLITS[name])


def digest_of(config: RunConfig, name: str) -> str:
    """The first digits of the SHA-256 of the rows of a source, of the "model"'s weight files, of
    the file that a "salience" of the user's own is in, or of the entries of a ready "mask".

    Wherever they lie it is the same. "" for a model without weight files, for a metric of ours, and
    without a ready mask. Raises DataError, ConfigError, AdapterError or OSError for what is not
    here.
    """
    if name == "salience":
        source = source_of(config.salience) if ":" in config.salience else b""
        full = hashlib.sha256(source).hexdigest() if source else ""
    elif name == "mask":
        mask = read_mask(config)
        full = "" if mask is None else mask.sha256
    elif name == "model":
        full = weights_digest(config.model)
    else:
        full = read_source(config, name).fingerprint()
    return full[:_DIGITS]


def weights_digest(model: str) -> str:
    folder = Path(str(cached_file(folder_or_id(model), "config.json"))).parent
    # A folder of such a name holds no weights, and a pipe would wait for its writer.
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [path for path in found if path.suffix == ".safetensors"]
    files = files or [path for path in found if path.suffix == ".bin"]
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest() if files else ""


def check_weights(model: PreTrainedModel, name: str) -> None:
    """Raises ConfigError that names the first parameter with a NaN or infinite value."""
    for parameter, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(
                f"model {name}: its parameter {parameter!r} holds NaN or infinite values; "
                "the file is damaged or its training failed"
            )


def check_fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Examples],
    encoded: Mapping[str, list[Encoded]],
) -> None:
    """Raises ConfigError for an example that the model has no positions or no embeddings for, or a
    padding token of that kind, which would end the run where it is met.
    """
    network: Any = model
    rows, positions = network.get_input_embeddings().weight.shape[0], positions_of(model)
    padding: Any = tokenizer.pad_token_id
    if padding >= rows:
        raise ConfigError(
            f"the tokenizer pads with token {padding} and the model has embeddings for {rows}: "
            "save the model after resize_token_embeddings, or give the tokenizer a pad_token that "
            "the model knows, such as its end token"
        )
    for name, items in encoded.items():
        longest = max((item.length for item in items), default=0)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"{sources[name].source}: its longest example has {longest} tokens, and the model "
                f"has positions for {positions}; lower --max-length to {positions}"
            )
        for key, what, known in (
            ("input_ids", "token", rows),
            ("token_type_ids", "token type", _types_of(model)),
        ):
            largest = max((max(item.inputs.get(key, ()), default=0) for item in items), default=0)
            if known is not None and largest >= known:
                raise ConfigError(
                    f"the tokenizer makes {what} {largest} of {sources[name].source} and the model "
                    f"has embeddings for {known}: they do not belong together"
                )


def positions_of(model: nn.Module) -> int | None:
    """How many tokens the model has learnt positions for; None where they are computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # Some count from behind the padding's own position, others from an offset.
            padding = module.padding_idx
            first = getattr(module, "offset", 0) if padding is None else padding + 1
            return int(module.num_embeddings) - int(first)
    return None


def _types_of(model: nn.Module) -> int | None:
    """How many types of tokens the model has embeddings for; None where it reads none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("token_type_embeddings"):
            return int(module.num_embeddings)
    return None


def check_rank(config: RunConfig, targets: Targets) -> None:
    """Raises ConfigError for a rank that the adapted layers have no room for.

    A matrix's rank is the length of its shorter side at most, and a small layer may have less than
    the others need. SHiRA trains as many entries of each as LoRA's factors have.
    """
    shapes = targets.shapes.values()
    if config.method in ("lora", "pissa"):
        limit = max(min(n, k) for n, k in shapes)
    elif config.method == "shira":
        limit = min(n * k // (n + k) for n, k in shapes)
    else:
        return
    if config.lora_rank > limit:
        raise ConfigError(
            f"lora_rank = {config.lora_rank} is too high: the adapted layers allow {limit} at most "
            f"with method {config.method!r}"
        )


def encode(task: Task, examples: Examples, display: Display) -> list[Encoded]:
    """The examples as tokens; `display` is told how many are left out, and how many cut."""
    encoded = task.encode(examples)
    left_out = len(examples) - len(encoded)
    if left_out:
        display.note(
            f"{examples.source}: {left_out} of {len(examples)} examples left out, because "
            "--max-length cuts off all of their response"
        )
    cut = sum(item.cut for item in encoded)
    if cut:
        display.note(
            f"{examples.source}: {cut} of {len(examples)} examples are longer than --max-length; "
            "where their response ends is not learnt"
        )
    return encoded
