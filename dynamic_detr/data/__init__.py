"""Datasets: registration, checks, augmentation and loading."""
