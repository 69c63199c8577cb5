"""Compiling for tests, with the fixture `nothing_compiled` of conftest.py."""

import torch
from torch._dynamo.utils import counters


def whole(module, backend="aot_eager"):
    """Compiled without a break in its graph, and to be compiled once for what it is called with."""
    # A graph that was cached knows the operations as they were then.
    options = {"fx_graph_cache": False} if backend == "inductor" else None
    return torch.compile(module, backend=backend, fullgraph=True, options=options)


def graphs():
    """How many were made since."""
    return counters["stats"]["unique_graphs"]
