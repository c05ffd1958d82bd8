"""Datasets and what stands between them and the model."""

from .scenes import register_scenes

register_scenes()
