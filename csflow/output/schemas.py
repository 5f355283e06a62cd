"""The Parquet schemas of `scores` and `errors`, and the columns that name an image version."""

import pyarrow as pa

from csflow.output.layout import Kind

KEY_COLUMNS = ["image_uri", "image_version"]
# Parquet's own name for the items of a list, so that a file's schema reads back as this one.
FLOATS = pa.list_(pa.field("element", pa.float32()))
REGION = pa.struct(
    [
        pa.field(name, pa.float64())
        for name in ("x", "y", "width", "height", "area", "peak", "mean", "p_value")
    ]
)
"""A region of an anomaly map; lengths are in pixels of the original."""
REGIONS = pa.list_(pa.field("element", REGION))
TAGS = pa.map_(pa.string(), pa.string())
"""What a plant calls an image: line, product, camera, part, by the names that it chose."""

SCORES = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("image_height", pa.int32(), nullable=False),
        pa.field("image_width", pa.int32(), nullable=False),
        pa.field("anomaly_score", pa.float64(), nullable=False),
        pa.field("scale_scores", FLOATS, nullable=False),
        pa.field("p_value", pa.float64(), nullable=False),
        pa.field("is_anomalous", pa.bool_(), nullable=False),
        pa.field("anomaly_map", FLOATS),
        pa.field("map_height", pa.int32(), nullable=False),
        pa.field("map_width", pa.int32(), nullable=False),
        pa.field("peak_y", pa.float32(), nullable=False),
        pa.field("peak_x", pa.float32(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("map_box", FLOATS),  # null if the map covers the whole image
        pa.field("global_score", pa.float64()),
        pa.field("global_p_value", pa.float64()),
        pa.field("local_score", pa.float64()),  # null, with the next two, from models without whitening
        pa.field("local_p_value", pa.float64()),
        pa.field("map_threshold", pa.float64()),  # null too if the held-out images are too few to tell
        pa.field("region_threshold", pa.float64()),  # null, with the next, as `map_threshold`
        pa.field("regions", REGIONS),
        pa.field("image_modified_at", pa.timestamp("us", tz="UTC")),  # null if the listing does not say
        pa.field("model_name", pa.string()),  # null if the model has no name
        pa.field("image_taken_at", pa.timestamp("us", tz="UTC")),  # null if the file has no EXIF time
        pa.field("tags", TAGS),  # null if no pattern gave the image any
        pa.field("part_p_value", pa.float64()),  # null if training did not know parts (--part)
    ]
)

ERRORS = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("error_code", pa.string(), nullable=False),
        pa.field("error_message", pa.string(), nullable=False),
        pa.field("is_transient", pa.bool_(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("failed_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("image_modified_at", pa.timestamp("us", tz="UTC")),
        pa.field("model_name", pa.string()),
        pa.field("tags", TAGS),
    ]
)

SCHEMAS: dict[Kind, pa.Schema] = {"scores": SCORES, "errors": ERRORS}
