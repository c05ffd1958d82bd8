"""Training: the trainer, its optimiser and step, checkpoints, launching, evaluation."""
