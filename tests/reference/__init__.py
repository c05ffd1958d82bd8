"""Reference implementations of the papers' equations, independent of the package: short and slow.

Most are loops in float64 NumPy over one unpadded image.
"""
