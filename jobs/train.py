"""Train a CS-Flow model on images of good parts.

On this machine, and on a Ray cluster with its images and model in object storage:

    python jobs/train.py --input data/good --output models/cells
    ray job submit --working-dir . -- python jobs/train.py --input s3://plant/good --output s3://plant/models/cells

The paper's settings:

    python jobs/train.py --input … --output … --recipe paper --backbone tf_efficientnet_b5 --weights timm \\
        --image_size 768
"""

from csflow.cli import run

if __name__ == "__main__":
    run("train", __doc__)
