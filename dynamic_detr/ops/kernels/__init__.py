"""Triton kernels, one file per operator, with the functions that launch them. These modules are
imported only where a kernel runs, as Triton may be missing.

If ``TRITON_INTERPRET=1`` is set before Triton is imported, kernels run on CPU tensors in Triton's
interpreter; the tests use this where there is no GPU. The interpreter computes bfloat16 wrongly, so
kernels convert what they load to float32 before any arithmetic.
"""
