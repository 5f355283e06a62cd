"""Measures how well anomaly scores and maps find what is known to be defective (docs/evaluation.md).

    python jobs/evaluate.py --scores out --labels labels.csv --output evaluation
    python jobs/evaluate.py --scores s3://bucket/out --layout mvtec

labels.csv holds the columns image_uri and label (0 normal, 1 defective), and optionally mask_uri and
defect_class.
"""

from csflow.cli import run

if __name__ == "__main__":
    run("evaluate", __doc__)
