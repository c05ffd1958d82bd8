"""Learnable blocks that more than one room uses."""
