"""A training step of all-MiniLM-L6-v2 with a classification head: forward, backward, optimizer.

32 x 64 tokens, float32, dropout off, masks by gradient salience on the same data, and one that is
drawn by SNIP's scores, as by default. The floor is the frozen model: the head trains, and the input
gradient goes through all layers, on every side.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ...pattern import SparsePattern
from .. import masks
from ..checks import close
from ..harness import Case, Saved, Side, Work, WrongResultError
from ..memory import saved_by, saved_for_backward
from ..trainers import (
    HEAD,
    LORA_RANK,
    Trainer,
    compiled,
    dense_mask,
    frozen,
    full,
    peft_methods,
    speft,
)

DENSITY = 0.005
LAYER, GLOBAL, DRAWN = "SPEFT per layer", "SPEFT global", "SPEFT drawn by SNIP"
FLOOR, FULL, MASKED = "frozen floor", "full fine-tuning", "dense delta under a mask"
# Ratio of the step times, at most. A peer is known by the start of its name.
GOALS = {
    LAYER: {FLOOR: 1.06, "PEFT LoRA": 0.76, "PEFT SHiRA": 0.76, "PEFT Super-Tuning": 0.76},
    GLOBAL: {FLOOR: 1.04},
    DRAWN: {},
}
SAVED_GOAL = 0.30
# Of the compiled step: the time over the floor's, as of the one that is not compiled; and the bytes
# that are saved for backward, of all the model, over those of the floor (1.02 at first).
COMPILED_GOAL, COMPILED_SAVED_GOAL = 1.06, 1.05


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the peers' libraries about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_quiet()
def setup() -> Case:
    torch.manual_seed(0)
    text = masks.text()
    chosen = {
        LAYER: masks.real_masks(DENSITY, "layer"),
        GLOBAL: masks.real_masks(DENSITY, "global"),
        DRAWN: masks.real_masks(DENSITY, "layer", "snip", "sample"),
    }
    per_layer = chosen[LAYER]
    prepares = {
        LAYER: speft(chosen[LAYER]),
        GLOBAL: speft(chosen[GLOBAL]),
        DRAWN: speft(chosen[DRAWN]),
        FLOOR: frozen,
        FULL: full,
        **peft_methods(per_layer),
        MASKED: dense_mask(per_layer),
    }
    trainers = {
        name: Trainer(text.model, prepare, text.steps) for name, prepare in prepares.items()
    }

    def check() -> None:
        if sides[0].saved is None or not sides[0].saved.bytes:
            raise WrongResultError(f"{LAYER}: what it keeps for backward escaped the hooks")
        check_losses(trainers)
        for name, patterns in {**chosen, MASKED: per_layer}.items():
            check_gradients(name, trainers[name], trainers[FULL], patterns)

    works = _works(per_layer, sum(p.nnz for p in chosen[GLOBAL].values()))
    head = sum(p.numel() for p in text.model.get_submodule(HEAD).parameters())
    sides: list[Side] = []
    for name, trainer in trainers.items():
        layers = [trainer.core.get_submodule(layer) for layer in per_layer]
        trainer.loss()  # the first pass finds out which layers read the same input
        goals = GOALS.get(name, {})
        sides.append(
            Side(
                name,
                trainer.step,
                name in GOALS,
                next((work for start, work in works.items() if name.startswith(start)), None),
                {
                    peer: ratio
                    for peer in trainers
                    for start, ratio in goals.items()
                    if peer.startswith(start)
                },
                saved_for_backward(layers, trainer.loss, SAVED_GOAL if name == LAYER else None),
                trainer.entries - head,
            )
        )
    name = f"{masks.MODEL}, {masks.BATCH} x {masks.LENGTH} tokens, masks {DENSITY:.1%}"
    return Case("step", f"{name} ({text.source})", sides, check, rounds=12, calls=2)


@_quiet()
def setup_compiled() -> Case:
    """The step with the model's forward and backward pass compiled by Inductor, on every side."""
    torch.manual_seed(0)
    text = masks.text()
    patterns = masks.real_masks(DENSITY, "layer")
    lora = {n: p for n, p in peft_methods(patterns).items() if n.startswith("PEFT LoRA")}
    prepares = {LAYER: speft(patterns), FLOOR: frozen, **lora}
    trainers = {n: Trainer(text.model, compiled(p), text.steps) for n, p in prepares.items()}
    reference = Trainer(text.model, full, text.steps)

    def check() -> None:
        check_losses(trainers)
        check_gradients(LAYER, trainers[LAYER], reference, patterns)

    works = _works(patterns, 0)
    saved = {name: saved_by(trainer.core, trainer.loss) for name, trainer in trainers.items()}
    goals = {FLOOR: COMPILED_GOAL}
    what = "bytes saved for backward by the model", f"{FLOOR}, the same"
    sides = [
        Side(
            name,
            trainer.step,
            name == LAYER,
            next((work for start, work in works.items() if name.startswith(start)), None),
            goals if name == LAYER else {},
            Saved(saved[name], saved[FLOOR], COMPILED_SAVED_GOAL if name == LAYER else None, *what),
        )
        for name, trainer in trainers.items()
    ]
    name = f"{masks.MODEL}, {masks.BATCH} x {masks.LENGTH} tokens, masks {DENSITY:.1%}, compiled"
    return Case("step", f"{name} ({text.source})", sides, check, rounds=12, calls=2)


def check_losses(trainers: Mapping[str, Trainer]) -> None:
    """Before the first step no delta is there, so every side computes the loss of the bare model.

    They add exact zeros to its products, and may sum these in other orders: a few roundings in each
    of the 36 layers' outputs, each worth a float32 eps of what the loss depends on.
    """
    with torch.no_grad():
        expected = trainers[FLOOR].loss().double().view(1)
        for name, trainer in trainers.items():
            bound = 36 * 4 * torch.finfo(torch.float32).eps
            close(f"{name}, first loss", trainer.loss().double().view(1), expected, bound)


def check_gradients(
    name: str,
    side: Trainer,
    reference: Trainer,
    patterns: Mapping[str, SparsePattern],
    tokens: int = masks.BATCH * masks.LENGTH,
) -> None:
    """The gradient of the trained entries is full fine-tuning's at the same places.

    Both sum M = `tokens` products in float32, in other orders. Roundings of random sign add up to
    sqrt(M) u times the sum of the absolute products, and that is sqrt(M) times the sum of products
    of random signs: an error of M u times the result, here the largest gradient of the layer.
    """
    share = tokens * torch.finfo(torch.float32).eps / 2
    present = {layer: pattern for layer, pattern in patterns.items() if not pattern.is_empty}
    expected = reference.gradients(present)
    for layer, found in side.gradients(present).items():
        exact = expected[layer].double()
        bound = 2 * share * float(exact.abs().max())
        close(f"{name}, gradient of {layer}", found.double(), exact, bound)


def _works(patterns: Mapping[str, SparsePattern], global_entries: int) -> dict[str, Work]:
    """What a step cannot do without, by the start of the side's name.

    Products of the linear layers (2 M N K each: forward and input gradient; the dense gradient is a
    third), of attention (two of 2 B L^2 H a layer of the encoder forward, and four backward), and
    of what trains. Weights are read once for each product; other traffic is not counted.
    """
    tokens = masks.BATCH * masks.LENGTH
    shapes = [pattern.shape for pattern in patterns.values()]
    weights = sum(n * k for n, k in shapes)
    config = masks.text().model.config
    attention = config.num_hidden_layers * 6 * 2 * tokens * masks.LENGTH * config.hidden_size
    frozen_work = 2 * 2 * tokens * weights + attention
    dense_work = frozen_work + 2 * tokens * weights
    # A x, B (A x), and the two gradients of each of these products.
    lora = 3 * 2 * tokens * LORA_RANK * sum(n + k for n, k in shapes)
    entries = sum(pattern.nnz for pattern in patterns.values())

    def work(operations: int, products: int = 2) -> Work:
        return Work({"weights": 4 * weights * products}, operations)

    return {
        LAYER: work(frozen_work + 2 * tokens * entries),
        DRAWN: work(frozen_work + 2 * tokens * entries),
        GLOBAL: work(frozen_work + 2 * tokens * global_entries),
        FLOOR: work(frozen_work),
        "PEFT LoRA": work(frozen_work + lora),
        **{name: work(dense_work, 3) for name in (FULL, "PEFT SHiRA", "PEFT Super", MASKED)},
    }


CASES = {"step": setup, "compiled": setup_compiled}
QUICK = ("step",)
