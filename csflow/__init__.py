"""csflow: train CS-Flow defect detectors and score whole image archives with them, on Ray."""

__version__ = "0.2.0"
