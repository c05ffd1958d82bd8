"""The operators in plain PyTorch, one file per operator: the CPU path and the reference of the
kernels."""
