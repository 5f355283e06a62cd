"""csflow: train CS-Flow defect detectors and score whole image archives with them, on Ray."""

__version__ = "0.1.0"
