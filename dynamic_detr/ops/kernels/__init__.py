"""Triton kernels, one file per operator; each file holds the kernels and the functions that launch
them on tensors. Imported only where a kernel runs: Triton may be missing.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, they run on CPU tensors
in Triton's interpreter, slowly, which is how they are tested without a GPU. It computes bfloat16
wrongly, so kernels convert what they load to float32 before any arithmetic.
"""
