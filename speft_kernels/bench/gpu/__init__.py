"""What judges the kernels on a GPU: `scripts/gpu_check.sh` builds, tests and measures there, and
leaves one record.

`check` runs the stages, each in a process of its own; `journal` keeps what they find as they find
it, `record` makes the committed record and table of it; `run` measures the cases, one module for
each operation; `timing` times them.
"""
