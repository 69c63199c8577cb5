"""Sparse fine-tuning in transformers' Trainer, with adapters for checkpoints."""

import os
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from speft_kernels import SpeftConfig, load_adapter, save_adapter, sparsify, summary


class SparseTrainer(Trainer):
    """The Trainer needs none of this to train, to resume or to find the best checkpoint: without it
    each checkpoint is the whole model, in which the sparse layers are known again.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        save_adapter(self.model, os.path.join(folder, "adapter"), overwrite=True)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(model or self.model, os.path.join(resume_from_checkpoint, "adapter"))

    def _load_best_model(self) -> None:
        load_adapter(self.model, os.path.join(self.state.best_model_checkpoint, "adapter"))


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(1)  # stands for from_pretrained(path_of_your_model)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=40, intermediate_size=128, **sizes)
    return BertForSequenceClassification(config)


torch.manual_seed(0)
labels, tokens = torch.randint(2, (512,)), torch.randint(40, (512, 16))
tokens[:, 4:8] = torch.randint(20, (512, 4)) + 20 * labels[:, None]  # what tells them apart
data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
train, held_out = data[:448], data[448:]
batches = [
    {key: torch.stack([row[key] for row in train[i : i + 16]]) for key in train[0]}
    for i in range(0, 128, 16)
]

model = make_model()
sparsify(model, SpeftConfig(density=0.1, head_warmup_steps=20), batches)
print(summary(model))

arguments = TrainingArguments(
    "runs/trainer",
    learning_rate=2e-2,
    weight_decay=0.0,  # values are differences from the base
    per_device_train_batch_size=16,
    num_train_epochs=4,
    eval_strategy="epoch",
    save_strategy="epoch",
    logging_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="loss",
    report_to=[],
)
trainer = SparseTrainer(model, arguments, train_dataset=train, eval_dataset=held_out)
last = get_last_checkpoint("runs/trainer") if os.path.isdir("runs/trainer") else None
trainer.train(resume_from_checkpoint=last)
save_adapter(model, "runs/trainer/best", overwrite=True)

again = make_model().eval()
load_adapter(again, "runs/trainer/best")
with torch.no_grad():
    found, wanted = again(**batches[0]).logits, model.cpu().eval()(**batches[0]).logits
torch.testing.assert_close(found, wanted)
