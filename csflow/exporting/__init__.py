"""Exports a model as one graph, for machines without PyTorch."""
