"""The methods of a run: masks that move, PEFT's adapters, budgets, and data to choose by."""

import json

import pytest
import torch
from tiny_runs import PEFT, Silent, lines, run, tensors, terminate

from speft_kernels.errors import ConfigError
from speft_kernels.finetune import load_classifier
from speft_kernels.finetune.signals import Interrupted


def test_a_moving_mask_is_chosen_again_on_other_examples_and_only_while_it_may(place, tmp_path):
    more = {"epochs": 2, "dynamic_every": 5, "dynamic_until": 0.5}  # 24 steps
    result = run(place, tmp_path / "run", "merge", **more)
    moves = result["dynamic"]
    assert (moves["strategy"], moves["steps"]) == ("merge", [5, 10])
    assert moves["seconds"] > 0
    assert all(moved > 0 for moved in moves["moved"])
    # The best model may be of any mask; its adapter holds what its masks touched until then.
    stored = sum(t.numel() for n, t in tensors(tmp_path / "run").items() if n.endswith(".values"))
    assert stored == moves["entries_in_adapter"]
    assert stored <= result["trainable_parameters_without_head"] + sum(moves["moved"])
    with pytest.raises(ConfigError, match="dynamic = 'merge' moves the mask of method 'speft'"):
        run(place, tmp_path / "lora", "lora", dynamic="merge")
    with pytest.raises(ConfigError, match="mode 'resident'"):
        run(place, tmp_path / "additive", mode="additive", dynamic="rigl")


@pytest.mark.parametrize("stop_at", [3, 4, 5])
def test_a_signal_while_the_mask_moves_loses_nothing(place, tmp_path, stop_at, monkeypatch):
    from speft_kernels.finetune.inputs import ScoringBatches

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    # The warm-up would pass over the same batches.
    settings = {"epochs": 1, "head_warmup_steps": 0}
    expected = run(place, straight, "merge", **settings)
    passes, batches = [], ScoringBatches.__iter__

    def signalled(self):
        passes.append(self)
        for number, batch in enumerate(batches(self)):
            if len(passes) == 2 and number == 1:  # within the first choice after the start
                terminate()
            yield batch

    with monkeypatch.context() as patch:
        if stop_at == 4:
            patch.setattr(ScoringBatches, "__iter__", signalled)
        display = Silent(stop_at if stop_at != 4 else None, terminate)
        with pytest.raises(Interrupted):
            run(place, stopped, "merge", display=display, **settings)
    result = run(place, stopped, "merge", resume=True, **settings)
    assert result["eval"] == expected["eval"]
    assert result["dynamic"]["moved"] == expected["dynamic"]["moved"]
    for name, tensor in tensors(stopped).items():
        assert torch.equal(tensor, tensors(straight)[name]), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's call
def test_a_pissa_adapter_loads_on_the_original_model_without_peft_changing_it_first(
    place, tmp_path
):
    """PiSSA trains on a residual of the base: its adapter must not need that residual."""
    from peft import PeftModel

    run(place, tmp_path / "run", "pissa", epochs=1)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 4  # twice that of the run
    model = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
    name = "backbone.encoder.layer.0.attention.self.query"
    before = model.get_submodule(name).weight.clone()
    loaded = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    assert torch.equal(loaded.base_model.model.get_submodule(name).base_layer.weight, before)


@pytest.mark.parametrize("method", ["speft", "rigl", "lora", "pissa", "full"])
def test_how_often_it_is_looked_at_changes_no_run(place, tmp_path, method):
    """Evaluating, and saving the best model, draw nothing that dropout would have drawn."""
    for name, every in (("seldom", 100), ("often", 2)):
        run(place, tmp_path / name, method, epochs=1, eval_every=every)
    seldom, often = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
        for name in ("seldom", "often")
    )
    assert seldom == often


def test_a_head_alone_is_timed(place, tmp_path):
    for steps in (0, 5):
        result = run(place, tmp_path / str(steps), "lora", max_steps=1, head_warmup_steps=steps)
        assert (result["salience"]["head_warmup_seconds"] > 0) == (steps > 0)


def test_a_budget_is_met_by_every_adapter(place, tmp_path):
    lora = 2 * (4 * 64 + 2 * 80)
    counts = {
        method: run(place, tmp_path / method, method, max_steps=1, lora_budget=1)[
            "trainable_parameters_without_head"
        ]
        for method in ("speft", *PEFT)
    }
    # SPEFT and Super-Tuning round in each of the 12 layers.
    assert counts == {m: pytest.approx(lora, abs=0 if m in PEFT[:3] else 12) for m in counts}
    for method in ("full", "head"):
        with pytest.raises(ConfigError, match=f"method '{method}' has no budget"):
            run(place, tmp_path / method, method, lora_budget=1)
    with pytest.raises(ConfigError, match="lora_budget = 32 is too much: LoRA's factors would be"):
        run(place, tmp_path / "more", lora_budget=32)


def test_validation_is_split_off_the_training_data(place, tmp_path):
    result = run(
        place, tmp_path / "run", eval=None, test=str(place / "eval.tsv"), validation=0.25, epochs=1
    )
    assert result["steps"] == 9  # 72 of 96 rows
    again = run(
        place, tmp_path / "again", eval=None, validation=0.25, max_steps=1, seed=5, method="head"
    )
    assert again["majority"] == result["majority"]  # the same rows, whatever the seed and method
    with pytest.raises(ConfigError, match="exclude each other"):
        run(place, tmp_path / "both", validation=0.25)
