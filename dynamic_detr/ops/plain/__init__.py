"""The operators in plain PyTorch, one file per operator: the reference for the kernels, and what
runs on a CPU."""
