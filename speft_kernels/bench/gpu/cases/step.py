"""A training step of a randomly initialised Llama model in bf16: forward, backward, optimizer.

Sides: the frozen model, which is the floor, SPEFT at 0.5 % of all projections, and PEFT's LoRA of
rank 16 on the same layers, as it comes (adapters in float32) and in bf16. On every side the input
gradient goes through all layers. No gradient checkpointing: for 8B and 8192 tokens the frozen model
keeps about 1.2 GB a layer (norms in float32 268 MB, attention 270, the MLP's products 705), 40 GB
in all, LoRA's float32 copies of its inputs another 1.3 GB a layer, logits and loss 17 GB, weights
16 GB: 115 GB at most (arithmetic).

A case has one of our backends, and in one case Inductor has compiled every side. All sides stand in
the memory at once, over one set of frozen weights, so that their steps can be interleaved. The
memory of a side is that of the weights, of what only it keeps between steps, and what a step adds
at its peak.

Masks are clustered as measured. One is drawn for each projection and turned to other rows and
columns in each layer. Layers that read one input share fewer columns than measured masks do: q, k
and v together use 56 % here, and 36-43 % in five layers of six of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import BackendError
from ....model import sparse_layers
from ....ops import registry
from ....pattern import SparsePattern
from ...checks import close
from ...harness import Work, WrongResultError
from ...trainers import Prepare, Trainer, speft
from ..bounds import summation_bound
from ..drawn import Mask
from ..problems import Spec, Workbench, rotated
from ..timing import GpuCase, GpuSide, why_left_out
from .layer import LORA, LORA_RANK, served_by
from .sampled_grad import exact_entries

FLOOR = "frozen floor"
LORA_BF16 = f"{LORA}, bf16"
# Of LoRA's time, for the 8B model; its memory is not to be exceeded.
GOAL, GOAL_MODEL = 0.80, "8B"
PROJECTIONS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "k",
    "o_proj": "q",
    "gate_proj": "gate",
    "up_proj": "gate",
    "down_proj": "down",
}
COMPILED = " compiled"
BATCHES = 2
# Of the timed steps of a case, by the model's size: six cases fit into the stage, and the seventh,
# which no goal is set for, where they leave time.
SECONDS = {"8B": 40.0, "1B": 20.0}


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    """`spec.projection` is the model's size, "1B compiled" for one that is compiled, and
    `spec.backend` the one that takes part: a slow one costs its own case. The peers are measured
    beside each.

    Raises:
        BackendError: the backend does not serve the device, or is barred: the peers are measured
            beside the others.
    """
    if spec.backend in bench.barred:
        raise BackendError(bench.barred[spec.backend])
    for operation in ("sampled_grad", "keep_columns", "write_delta"):
        registry.resolve(operation, bench.device.torch, torch.bfloat16, spec.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers about each other
        return _setup(spec, bench)


def _setup(spec: Spec, bench: Workbench) -> GpuCase:
    device, size = bench.device, spec.projection.removesuffix(COMPILED)
    # On a CPU the sides are tried, and not timed.
    compiler = None if size == spec.projection else "inductor" if device.is_cuda else "aot_eager"
    settings = bench.scale.models[size]
    batch, length = bench.scale.sequences
    model = llama(settings, device.torch)
    weights = device.allocated()
    patterns = masks(model, spec, bench)
    shape = (batch, length)
    drawn = [
        torch.randint(0, model.config.vocab_size, shape, device=device.torch)
        for _ in range(BATCHES)
    ]
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in drawn]
    prepares: dict[str, Prepare] = {FLOOR: _frozen, f"SPEFT {spec.backend}": speft(patterns)}
    prepares[LORA] = partial(_lora, names=list(patterns))
    prepares[LORA_BF16] = partial(_lora, names=list(patterns), autocast_adapter_dtype=False)

    sides: list[GpuSide] = []
    left_out, own = {}, {}
    floor: Trainer | None = None
    for name, prepare in prepares.items():
        backend = name.removeprefix("SPEFT ") if name.startswith("SPEFT ") else None
        before = device.allocated()
        bench.trying(name)
        make = partial(Trainer, model, prepare, batches, share=True)
        try:
            trainer: Trainer | str = _made(make, backend, floor, compiler)
            device.synchronize()
        except Exception as error:
            trainer = why_left_out(name, error, device)
        device.free()
        if isinstance(trainer, str):
            left_out[name] = trainer
            continue
        floor = floor or trainer
        own[name] = weights + device.allocated() - before
        goal = spec.projection == GOAL_MODEL and backend not in (None, "torch")
        sides.append(
            GpuSide(
                name,
                partial(_step, trainer, backend),
                backend is not None,
                _work(name, model, patterns, batch, length),
                {LORA: GOAL, LORA_BF16: GOAL} if goal else {},
                trained=trainer.entries,
            )
        )
    return GpuCase(
        "step",
        f"Llama {spec.projection}, {batch} x {length} tokens, {spec.mask} "
        f"{100 * spec.density:g}%, {spec.backend}",
        sides,
        left_out,
        calls=3,
        seconds=SECONDS[size],
        own_bytes=own,
        memory_goals={LORA: 1.0, LORA_BF16: 1.0} if spec.projection == GOAL_MODEL else {},
        tokens=batch * length,
    )


def _made(
    make: Callable[[], Trainer], backend: str | None, floor: Trainer | None, compiler: str | None
) -> Trainer:
    """A side that is right and has taken its first steps, with the optimizer's state and whatever
    is built once; a compiler's code among it.
    """
    with served_by(backend) if backend else nullcontext():
        trainer = make()
        if floor is not None:
            _check_loss(trainer, floor)
        if backend is not None:
            _check_gradient(trainer)
        if compiler is not None:
            trainer.model = torch.compile(trainer.model, backend=compiler)  # type: ignore[assignment]
            if floor is not None:
                _check_loss(trainer, floor)
        for _ in range(2):  # the second finds out which layers read the same input
            trainer.step()
    return trainer


def llama(settings: Mapping[str, Any], device: torch.device) -> Any:
    """A Llama model with random weights in bf16, made where it runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**settings, "use_cache": False, "attn_implementation": "sdpa"})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def masks(model: nn.Module, spec: Spec, bench: Workbench) -> dict[str, SparsePattern]:
    """Layer's name -> mask, for the seven projections of each layer."""
    layers: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in PROJECTIONS and isinstance(module, nn.Linear):
            layers[name] = kind, (module.out_features, module.in_features)
    seeds = {kind: seed for seed, kind in enumerate(PROJECTIONS)}
    bench.draw(Mask(shape, spec.mask, spec.density, seeds[kind]) for kind, shape in layers.values())
    return {
        name: rotated(bench.pattern(shape, spec.mask, spec.density, seeds[kind]), number)
        for number, (name, (kind, shape)) in enumerate(layers.items())
    }


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _lora(model: nn.Module, names: list[str], **settings: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=LORA_RANK, target_modules=names)
    adapted: nn.Module = peft.get_peft_model(model, config, **settings)
    return adapted.eval()


def _step(trainer: Trainer, backend: str | None) -> None:
    if backend is None:
        trainer.step()
        return
    with served_by(backend):
        trainer.step()


def _check_loss(trainer: Trainer, floor: Trainer) -> None:
    """Adapters start by adding zeros, so every side starts with the loss of the frozen model, up to
    the rounding of its logits to bf16, of which the loss is a mean.
    """
    with torch.no_grad():
        expected, found = floor.loss().double().view(1), trainer.loss().double().view(1)
    close("first loss", found, expected, torch.finfo(torch.bfloat16).eps * float(expected))


def _check_gradient(trainer: Trainer) -> None:
    """The gradient of the last projection, whose operands come alike on every run: attention's own
    backward pass lies below it.
    """
    name, layer = list(sparse_layers(trainer.core).items())[-1]
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"] = arguments[0].detach().flatten(0, -2)
        output.register_hook(lambda dy: seen.update(dy=dy.flatten(0, -2)))

    with layer.register_forward_hook(note):
        trainer.backward()
    exact = exact_entries(seen["dy"], seen["x"], layer.pattern)
    if not float(exact.abs().max()) > 0:
        raise WrongResultError(f"{name}: its gradient is zero everywhere, which checks nothing")
    # Its operands are no random numbers: bounded by the sums of the products' magnitudes.
    size = exact_entries(seen["dy"].abs(), seen["x"].abs(), layer.pattern)
    bound = summation_bound(seen["x"].shape[0], float(size.max()), seen["x"].dtype)
    assert layer.values.grad is not None
    close(f"gradient of {name}", layer.values.grad.double(), exact, bound)
    trainer.forget_gradients()


def _work(
    name: str, model: Any, patterns: Mapping[str, SparsePattern], batch: int, length: int
) -> Work:
    """What a step cannot do without: each product forward and for the input gradient (2 M N K
    each), those of causal attention (half of two of 2 B L^2 H a layer forward, four backward), and
    those of what trains. Weights are read once for each product; other traffic is not counted.
    """
    config, tokens = model.config, batch * length
    shapes = [pattern.shape for pattern in patterns.values()]
    weights = sum(n * k for n, k in shapes) + config.vocab_size * config.hidden_size
    operations = 2 * 2 * tokens * weights
    operations += config.num_hidden_layers * 6 * tokens * length * config.hidden_size
    if name.startswith("SPEFT"):
        operations += 2 * tokens * sum(pattern.nnz for pattern in patterns.values())
    if name.startswith("PEFT LoRA"):
        operations += 3 * 2 * tokens * LORA_RANK * sum(n + k for n, k in shapes)
    return Work({"weights": 2 * weights * 2}, operations, torch.bfloat16)
