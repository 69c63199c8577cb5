"""Triton kernels, one file an operation; installed as `speft_kernels.triton_kernels`."""
