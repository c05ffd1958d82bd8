"""What the papers' equations say, written out a second time: float64, NumPy, one unpadded image,
one loop for everything that is summed. Slow, short, and without a line of the project's code."""
