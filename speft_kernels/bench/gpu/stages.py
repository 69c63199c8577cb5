"""The stages of the GPU check, and how their processes end. Nothing here imports torch."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """What a stage is for, and the seconds that it may take."""

    seconds: float
    what: str


# In their order: whoever has ten minutes has what the goals measure and what the suite finds,
# without which no backend counts as verified; then the other figures.
STAGES = {
    "build": Stage(270, "compile the package for this GPU and install it in place"),
    "small": Stage(
        120, "each operation by each backend once, on small tensors, in a process of its own"
    ),
    "goals": Stage(240, "each operation and one layer against their peers, where there are goals"),
    "test": Stage(470, "the GPU suite: pytest -m gpu tests/gpu"),
    "kernels": Stage(470, "the same operations at other tokens, densities and masks"),
    "step": Stage(
        590, "training steps of Llama models of 8B and 1B against the frozen model and LoRA"
    ),
    "sanitize": Stage(470, "the GPU kernels on small tensors under compute-sanitizer"),
    "matrix": Stage(
        470, "the kernels at all tokens, densities and masks that the stage kernels leaves out"
    ),
    "tune": Stage(300, "the Triton kernels' settings that are worth trying, beside the default"),
}

# Exit statuses of a stage's process. OUT_OF_TIME: cases are left. RESTART: its device is lost, and
# a new process goes on; 75 is EX_TEMPFAIL of sysexits.h. MISSING: the backend cannot run here.
OUT_OF_TIME, MISSING, RESTART = 3, 4, 75
