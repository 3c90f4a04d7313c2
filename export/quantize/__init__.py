"""The frozen part of a model in integers."""
