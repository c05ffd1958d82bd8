"""Files: configurations, model files and checkpoints read safely; files written whole or not at
all."""
