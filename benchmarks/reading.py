"""CPU milliseconds to read a photograph from an S3 server on this machine: csflow's way and others.

    python benchmarks/reading.py

Threads read; CPU is that of the whole process, without the server's.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import boto3
import plant
import pyarrow as pa
import results
from botocore.config import Config
from fsspec.asyn import sync

from csflow.inputs.listing import list_images
from csflow.inputs.objects import ObjectStore
from csflow.inputs.uris import split_s3

THREADS = 8
PHOTOGRAPHS, ROUNDS = 1000, 5
Image = tuple[str, str]
"""URI and version."""


def clients() -> dict[str, Callable[[Image], bytes]]:
    store = ObjectStore({}, deadline_s=120.0)
    fs = store.remote("s3://")
    boto = boto3.client("s3", config=Config(max_pool_connections=THREADS))

    def with_boto3(image: Image) -> bytes:
        bucket, key = split_s3(image[0])
        return boto.get_object(Bucket=bucket, Key=key, IfMatch=image[1])["Body"].read()

    return {
        "csflow: obstore": lambda image: store.fetch(*image),
        "s3fs": lambda image: sync(fs.loop, fs._cat_file, image[0]),
        "boto3": with_boto3,
    }


def main(server: plant.S3Server) -> None:
    ways = clients()
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    table = pa.Table.from_batches(list_images([server.put_photographs("night", PHOTOGRAPHS)], {}))
    images = list(zip(table["image_uri"].to_pylist(), table["image_version"].to_pylist(), strict=True))
    assert len({way(images[0]) for way in ways.values()}) == 1
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started, cpu_started = time.perf_counter(), time.process_time()
                for _ in pool.map(way, images):
                    pass
                taken = time.perf_counter() - started, time.process_time() - cpu_started
                spent[name].append((len(images) / taken[0], 1000 * taken[1] / len(images)))
    lines = ["| client | CPU ms an image | images/s |", "|---|---|---|"]
    for name, rounds in spent.items():
        rate, milliseconds = (statistics.median(column) for column in zip(*rounds, strict=True))
        lines.append(f"| {name} | {milliseconds:.2f} | {rate:.0f} |")
    lines += ["", f"{PHOTOGRAPHS} photographs of {table['size_bytes'].to_numpy().mean() / 1000:.0f} kB."]
    results.record("Reading from S3", "\n".join(lines), "python benchmarks/reading.py")


if __name__ == "__main__":
    with plant.s3_server() as s3:
        main(s3)
