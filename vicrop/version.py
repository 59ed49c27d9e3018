"""The version of the toolkit: the only place that says it."""

__version__ = "2.0.0"
