"""Score images with a trained model and write anomaly scores and maps to Parquet.

On this machine, and on a Ray cluster every night:

    python jobs/score.py --model models/cells --input data/archive --output scores
    ray job submit --working-dir . -- python jobs/score.py --model s3://plant/models/cells \\
        --input s3://plant/images --output s3://plant/scores

The same line again completes the output: images already scored are skipped, new and changed ones are
scored. Exit status 3 says that images are missing for a reason that may pass.
"""

from csflow.cli import run

if __name__ == "__main__":
    run("score", __doc__)
