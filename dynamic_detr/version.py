"""The version of the project, for the package and for the models that it writes."""

__version__ = "0.1.0"
