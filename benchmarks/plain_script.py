"""What one would write in csflow's place: a DataLoader over S3 objects, scores to Parquet with pandas.

    python benchmarks/plain_script.py MODEL s3://bucket/prefix scores.parquet

It scores the same pixels with the same detector. It has no plan, no retries and no errors table: one bad
image or one refused request ends it, and nothing is kept.
"""

import argparse
import time

import boto3
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from csflow.calibration import p_values
from csflow.images import decode
from csflow.model_directory import load_model
from csflow.storage import Location


class S3Images(Dataset):
    def __init__(self, bucket, keys, preprocessing):
        self.bucket, self.keys, self.preprocessing = bucket, keys, preprocessing
        self.client = None

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        if self.client is None:  # one for each worker process
            self.client = boto3.client("s3")
        data = self.client.get_object(Bucket=self.bucket, Key=self.keys[index])["Body"].read()
        image = decode(data, self.preprocessing)
        return self.keys[index], torch.from_numpy(image.pixels_HWC), image.height, image.width


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("output")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    bucket, _, prefix = arguments.images.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [item["Key"] for page in pages for item in page["Contents"]]

    model = load_model(Location(arguments.model))
    dataset = S3Images(bucket, keys, model.detector.architecture.preprocessing)
    loader = DataLoader(dataset, arguments.batch_size, num_workers=arguments.workers)
    frames = []
    with torch.inference_mode():
        for names, pixels_BHWC, height_B, width_B in loader:
            scores = model.detector(pixels_BHWC)
            anomaly_score = scores.anomaly_score_B.double().numpy()
            frames.append(
                pd.DataFrame(
                    {
                        "image_uri": names,
                        "image_height": height_B,
                        "image_width": width_B,
                        "anomaly_score": anomaly_score,
                        "p_value": p_values(anomaly_score, model.calibration.anomaly_score),
                        "anomaly_map": list(scores.anomaly_map_BHW.flatten(1).numpy()),
                        "scored_at": time.time(),
                    }
                )
            )
    pd.concat(frames).to_parquet(arguments.output, compression="zstd")


if __name__ == "__main__":
    main()
