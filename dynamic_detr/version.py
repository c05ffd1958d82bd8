"""The version of the package, which model files also record."""

__version__ = "0.1.0"
