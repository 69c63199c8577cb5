"""How entries can be chosen, and how they are where nothing is said: defaults that belong together.
`docs/study.md` has the experiments.
"""

from __future__ import annotations

from typing import TypeVar

Salience = TypeVar("Salience")

# The values of the settings that name one of a few.
CHOICES = {
    "scope": ("layer", "global"),
    "selection": ("top", "sample"),
    "mode": ("resident", "additive"),
    "accumulate": ("sum", "absolute", "square"),
    "accumulator_dtype": ("float32", "weight"),
    "accumulator_device": ("model", "cpu"),
    "grasp_sign": ("paper", "code"),
}
SALIENCE, SELECTION, SAMPLE_COLUMNS = "snip", "sample", 0.5
# Of a classifier's new head, before its gradients are scored: without them the study's averages are
# two points lower.
HEAD_WARMUP_STEPS = 50


def choice(salience: Salience | None, selection: str | None) -> tuple[Salience | str, str]:
    """Return salience and selection, where None leaves either to us.

    A salience that is named selects its highest scores, as in the paper.
    """
    if salience is None:
        return SALIENCE, SELECTION if selection is None else selection
    return salience, "top" if selection is None else selection


def is_drawn(salience: object, selection: str) -> bool:
    """Whether entries are drawn, and not the highest of some score."""
    return selection == "sample" or salience == "random"
