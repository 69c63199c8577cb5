"""What SPEFT is compared with: the adapters of PEFT, on the same layers and in the same loop."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, reason_of
from ..install import put_linear_for_conv1d
from ..targets import Targets
from .config import RunConfig


def adapt(model: nn.Module, config: RunConfig, targets: Targets) -> nn.Module:
    """`model` inside PEFT's wrapper: `config.method` on `targets.layers`, the head trained densely.

    "pissa" starts LoRA's factors from the weight's leading singular vectors; "shira" trains random
    entries, as many as LoRA of the same rank; "supertuning" the entries of the largest magnitude.

    Raises:
        ConfigError: see `library`.
    """
    peft = library(config.method)
    put_linear_for_conv1d(model, targets.layers)  # which is all that some of them know
    shared: dict[str, Any] = {
        "target_modules": list(targets.layers),
        "modules_to_save": list(targets.dense_modules) or None,
    }
    if config.method in ("lora", "pissa"):
        settings: Any = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            init_lora_weights="pissa" if config.method == "pissa" else True,
            **shared,
        )
    elif config.method == "shira":
        settings = peft.ShiraConfig(r=config.lora_rank, random_seed=config.seed, **shared)
    else:
        settings = peft.SupertuningConfig(sparsity=1 - config.density, **shared)
    with warnings.catch_warnings():
        # PEFT asks the model by a name that transformers deprecates; nothing for the user to do.
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = peft.get_peft_model(model, settings)
    if config.method == "pissa":
        adapted.speft_start = _adapter(adapted)
    return adapted


def library(method: str) -> Any:
    """The module peft. Raises ConfigError where it is missing, or too old for `method`."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"method {method!r} needs the library peft: pip install 'speft-kernels[peft]'"
        ) from error
    if method == "supertuning" and not hasattr(peft, "SupertuningConfig"):
        raise ConfigError(
            f"method 'supertuning' is not in the installed peft {peft.__version__}: "
            "pip install --upgrade peft"
        )
    return peft


def save(model: Any, config: RunConfig, folder: Path) -> None:
    """Writes PEFT's own adapter into `folder`. It loads on the original model, where PEFT's method
    knows the kind of its layers: SHiRA and Super-Tuning do not know a `Conv1D`, which `load` makes
    linear.

    PiSSA moves what it starts from out of the base weight. PEFT turns the trained factors and those
    it started from into a LoRA of twice the rank over the weight as it was.
    """
    if config.method != "pissa":
        model.save_pretrained(folder)
        return
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict

    with (
        tempfile.TemporaryDirectory() as start,
        warnings.catch_warnings(),
        torch.random.fork_rng(),  # the conversion draws an adapter's first factors
    ):
        warnings.simplefilter("ignore", UserWarning)  # of the base weights that are not saved
        settings = model.peft_config["default"]
        settings.init_lora_weights = True  # or saving would ask for the conversion here too
        model.save_pretrained(start, state_dict=model.speft_start)
        settings.init_lora_weights = "pissa"
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
    # The conversion keeps the factors alone: the head has to be put beside them again.
    path = folder / SAFETENSORS_WEIGHTS_NAME
    trained = get_peft_model_state_dict(model)
    heads = {name: t.contiguous() for name, t in trained.items() if ".lora_" not in name}
    save_file({**load_file(path), **heads}, path, metadata={"format": "pt"})


def load(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapter that `save` wrote. Raises ConfigError, AdapterError."""
    peft = library("lora")
    try:
        with warnings.catch_warnings():
            # Of the head's weights, which the adapter brings; but not of any that it lacks.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("error", message=".*missing adapter keys")
            named = peft.PeftConfig.from_pretrained(folder).target_modules
            put_linear_for_conv1d(model, named or ())
            loaded: nn.Module = peft.PeftModel.from_pretrained(model, folder)
    except Exception as error:  # PEFT passes on errors of every library and file format below it
        raise AdapterError(f"{folder}: PEFT cannot load it: {reason_of(error)}") from error
    return loaded


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
