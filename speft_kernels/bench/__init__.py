"""Benchmarks of every operation and of the whole training step, behind `speft bench` and
`benchmarks/`.

Only ratios of sides that were timed in the same interleaved rounds of one process mean anything:
between two processes or two minutes the same call differs by more than most things worth measuring.
"""
