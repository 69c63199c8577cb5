"""transformers' Trainer trains a sparse model, resumes from its checkpoints and finds the best."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import bert_classifier, gpt2, token_batches
from tiny_text import save_llama

from speft_kernels import SpeftConfig, load_adapter, save_adapter, sparse_layers, sparsify

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "transformers_trainer.py"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example, run once more in this process: its folder and its names."""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, runpy.run_path(str(EXAMPLE))


def test_the_example_trains_and_resumes(example):
    folder, names = example
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    last = folder / "runs" / "trainer" / "checkpoint-112"
    assert not list(last.glob("*.safetensors"))
    assert (last / "adapter" / "adapter.safetensors").stat().st_size < 100_000
    assert names["last"] is None
    done = subprocess.run(
        [sys.executable, EXAMPLE], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"'loss'", done.stdout)  # all steps were done


CASES = {
    "classifier": (bert_classifier, False, SpeftConfig(density=0.1)),
    "conv1d": (gpt2, True, SpeftConfig(density=0.1, modules_to_train=[])),
}


@pytest.mark.parametrize("kind", ["whole", "adapters"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_off_goes_on_as_if_it_was_not(case, kind, example, tmp_path):
    """Also where a checkpoint is the whole model, as the Trainer writes it by itself."""
    make, causal, config = CASES[case]
    trainer_type = transformers.Trainer if kind == "whole" else example[1]["SparseTrainer"]
    batches = token_batches(8, causal=causal)
    data = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(4)]

    def trainer(name):
        model = make()
        sparsify(model, config, batches[:2])
        arguments = transformers.TrainingArguments(
            str(tmp_path / name),
            **{"max_steps": 8, "logging_steps": 1, "save_steps": 4, "eval_steps": 4},
            **{"eval_strategy": "steps", "load_best_model_at_end": True},
            **{"learning_rate": 1e-2, "weight_decay": 0.0},
            **{"report_to": [], "use_cpu": True, "disable_tqdm": True},
        )
        return trainer_type(model, arguments, train_dataset=data, eval_dataset=data[:8])

    first, second = trainer("first"), trainer("second")
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    one, other = (
        [(entry["step"], entry["loss"]) for entry in each.state.log_history if "loss" in entry]
        for each in (first, second)
    )
    assert [step for step, _ in one] == list(range(1, 9))
    assert one == other
    # The best of the two checkpoints is in the model, and the base under it is the same.
    best = min(
        (entry["eval_loss"], entry["step"])
        for entry in first.state.log_history
        if "eval_loss" in entry
    )
    assert first.state.best_model_checkpoint.endswith(f"checkpoint-{best[1]}")
    assert first.evaluate()["eval_loss"] == best[0]
    for name, layer in sparse_layers(first.model).items():
        assert torch.equal(layer.values, sparse_layers(second.model)[name].values), name
    save_adapter(first.model, tmp_path / "adapter")
    again = make().eval()
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        logits = [m.eval()(**batches[0]).logits for m in (again, first.model)]
    assert torch.equal(*logits)
    files = {path.suffix for path in (tmp_path / "first" / "checkpoint-4").iterdir()}
    assert (".safetensors" in files) == (kind == "whole")
    state = json.loads((tmp_path / "first" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


def test_trl_trains_a_sparse_model_on_conversations(tmp_path):
    """Scored on the batches that its trainer makes, with the checkpoints that it turns on."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    save_llama(tmp_path / "model", ["one plus two is three"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )

    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": said("user", f"{a} plus {b}"), "completion": said("assistant", str(a + b))}
        for a in range(6)
        for b in (1, 2)
    ]
    make = transformers.AutoModelForCausalLM.from_pretrained
    model = make(tmp_path / "model")
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path / "run"),
            **{"max_steps": 24, "logging_steps": 1, "per_device_train_batch_size": 4},
            **{"learning_rate": 2e-2, "weight_decay": 0.0, "bf16": False, "save_steps": 24},
            **{"report_to": [], "use_cpu": True, "disable_tqdm": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    sparsify(model, SpeftConfig(density=0.1), batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert model.model.layers[0].gradient_checkpointing
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trained = {f"{name}.{part}" for name in sparse_layers(model) for part in ("weight", "values")}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == trained
    save_adapter(model, tmp_path / "adapter")
    again = make(tmp_path / "model").eval()
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        logits = [m.eval()(batches[0]["input_ids"]).logits for m in (again, model)]
    assert torch.equal(*logits)
