"""Tiny language models, tokenizers trained on the spot, and small data files, for the tests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = ("lovely", "bright", "clever", "warm", "funny")
BAD = ("dull", "cold", "clumsy", "bitter", "slow")
FILLER = ("the", "film", "plot", "is", "was", "a", "story", "and", "of", "people", "in", "town")


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) with as many telling words as others, the labels `good` and `bad` in turn."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        label = ("good", "bad")[number % 2]
        length = generator.randint(2, 5)
        words = generator.choices(FILLER, k=length)
        words += generator.choices(GOOD if label == "good" else BAD, k=length)
        generator.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_tsv(path: Path, rows: Iterable[Sequence[str]], header: str = "sentence\tlabel") -> Path:
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", "utf-8")
    return path


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_sums(folder: Path) -> list[dict[str, str]]:
    """Write `train.jsonl` and `eval.jsonl`, prompts and responses; return those of the former."""
    rows = [{"prompt": f"{a} plus {b} =", "response": str(a + b)} for a in range(6) for b in (1, 2)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", rows[:4])
    return rows


def save_bert(folder: Path, texts: Iterable[str], *, dropout: float = 0.1, **sizes: int) -> Path:
    """An encoder with random weights and a word-level tokenizer of `texts`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    config = BertConfig(
        **{
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "initializer_range": 0.05,
            **sizes,
        }
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def save_llama(folder: Path, texts: Iterable[str]) -> Path:
    """A language model with random weights and a byte-level BPE tokenizer of `texts`."""
    config = LlamaConfig(
        vocab_size=_save_bpe(folder, texts),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # the output head stays frozen and must be able to prefer a token
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, texts: Iterable[str]) -> Path:
    """A GPT-2 with random weights and a byte-level BPE tokenizer of `texts`."""
    config = GPT2Config(
        vocab_size=_save_bpe(folder, texts),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _save_bpe(folder: Path, texts: Iterable[str]) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()
