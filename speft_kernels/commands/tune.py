"""`speft tune`: measure what the plan's cost model needs to know of this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..errors import ConfigError
from .numbers import threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads", type=threads, metavar="N", help="threads of the CPU (default: torch's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and print, keep nothing")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..costs import DEFAULTS, cache_file, machine_key, remember
    from ..tune import calibrate

    if args.device not in DEFAULTS:
        raise ConfigError(f"--device must be one of {', '.join(DEFAULTS)}, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    costs = calibrate(device)
    print(f"{machine_key(device)}: picoseconds, measured (default)")
    for name, seconds in asdict(costs).items():
        if name == "fused_tokens":
            continue
        default = getattr(DEFAULTS[args.device], name)
        print(f"  {name:8} {seconds * 1e12:14,.1f} ({default * 1e12:,.1f})")
    if args.device == "cuda":
        default = DEFAULTS["cuda"].fused_tokens
        print(f"sparse_delta_matmul reads W once up to {costs.fused_tokens} tokens ({default})")
    if args.dry_run:
        print("nothing kept")
        return 0
    try:
        print(f"kept in {remember(device, costs)}")
    except OSError as error:
        raise ConfigError(f"the costs cannot be kept in {cache_file()}: {error}") from error
    return 0
