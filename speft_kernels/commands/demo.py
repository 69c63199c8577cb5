"""`speft finetune` without data: from which package of the standard library is a docstring?"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import new_output, writing
from ..finetune.config import DEFAULT_MODEL, RunConfig
from ..finetune.demo_data import DemoData, Docstring, collect
from ..finetune.folder import RunFolder

SIDES = ("train", "eval", "test")
SETTINGS: dict[str, Any] = {"model": DEFAULT_MODEL, "max_length": 64, "batch_size": 32}
# Chosen by accuracy on the eval side, one seed each. Head: 1e-2 (77.2 %) before 3e-3 (75.5 %), with
# more epochs than it needs. SPEFT: the defaults (83.2 %); with 1,024 scoring examples, not 512,
# 84.2 %, and then without the 50 steps of the head alone 82.3 %, the highest scores of SNIP 82.1 %
# and of the gradient 78.8 % at 5e-3.
METHODS: dict[str, dict[str, Any]] = {
    "head": {"epochs": 8, "lr": 1e-2},
    "speft": {"epochs": 8, "head_lr": 1e-2},
}
# Of what trains beside the head: a run of the head alone refuses them.
BESIDE_THE_HEAD = ("lora_budget", "dynamic")


def run_demo(settings: dict[str, Any], *, overwrite: bool) -> None:
    """Trains a head on the frozen encoder, then head and sparse values; prints held-out accuracies.

    `settings` override the demo's own; what belongs to a user's data is refused.
    """
    for name in ("eval", "test", "validation", "task", "method", "mask"):
        if name in settings:
            raise ConfigError(f"--{name} without --train: name the training data too")
    from ..finetune.loop import check_moves
    from ..finetune.models import folder_or_id
    from ..finetune.result import describe
    from ..finetune.run import finetune
    from ..finetune.tasks import check_metric, majority_scores, positive_label

    root = Path(settings.pop("output", f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"))
    configs = {}
    for method, own in METHODS.items():
        files = {side: str(root / "data" / f"{side}.jsonl") for side in SIDES}
        left_out = BESIDE_THE_HEAD if method == "head" else ()
        given = {name: value for name, value in settings.items() if name not in left_out}
        configs[method] = RunConfig.from_dict(
            {**SETTINGS, **own, **given, **files, "method": method, "output": str(root / method)}
        )
        folder_or_id(configs[method].model)
    print("Which package of Python's standard library does a docstring come from?")
    data = collect()
    for config in configs.values():  # before anything is written
        check_metric(config.metric_name, len(data.labels))
        positive_label(config.positive_name, data.labels)
        check_moves(config, len(data.train))
    _write(root, data, overwrite)
    print(
        f"{len(data.labels)} packages; {len(data.train):,} docstrings to train on, "
        f"{len(data.eval):,} to choose the best model, {len(data.test):,} held out\n"
    )
    known, asked = ([data.labels.index(e.label) for e in s] for s in (data.train, data.test))
    always = majority_scores(known, asked, len(data.labels))
    accuracies = {"majority class": always["accuracy"]}
    for method, config in configs.items():
        title = "frozen encoder, trained head" if method == "head" else "SPEFT"
        print(f"--- {title}")
        result = finetune(config)
        print(describe(result, config.output) + "\n")
        if method == "speft":
            title += f" ({result['trainable_parameters_without_head']:,} trained weights, "
            title += f"{result['density']:.2%})"
        accuracies[title] = result["test"]["accuracy"]
    print(f"Held-out accuracy ({len(data.test):,} docstrings):")
    for title, accuracy in accuracies.items():
        print(f"  {accuracy:6.1%}  {title}")


def _write(root: Path, data: DemoData, overwrite: bool) -> None:
    from ..finetune.run import check_nothing_else, check_run_alone

    if root.exists():
        if not overwrite:
            raise ConfigError(
                f"output {root} exists already; choose another --output or give --overwrite"
            )
        if not (root / "data" / "train.jsonl").is_file():
            raise ConfigError(f"output {root} is not a demo's folder, so it is not overwritten")
        check_nothing_else(root, ("data", *METHODS))
        check_nothing_else(root / "data", [f"{side}.jsonl" for side in SIDES])
        for folder in [RunFolder(root / method) for method in METHODS]:
            if folder.root.exists():
                check_run_alone(folder)
        with writing(root):
            shutil.rmtree(root)
    with new_output(root / "data") as draft:
        for side in SIDES:
            examples: Sequence[Docstring] = getattr(data, side)
            lines = [json.dumps({"sentence": e.text, "label": e.label}) + "\n" for e in examples]
            (draft / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
