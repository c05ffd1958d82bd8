"""Datasets: registration, checks, augmentation and loading."""

from .scenes import register_scenes

register_scenes()
