"""Training: trainer, step, optimiser, checkpoints, averaging, evaluation."""
