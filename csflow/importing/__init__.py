"""Imports CS-Flow models that other code bases trained."""
