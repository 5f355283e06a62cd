"""The Parquet schemas of a scoring run's output, and where its files lie below `--output`."""

import pyarrow as pa

SCORES = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("image_height", pa.int32(), nullable=False),
        pa.field("image_width", pa.int32(), nullable=False),
        pa.field("anomaly_score", pa.float64(), nullable=False),
        pa.field("scale_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("p_value", pa.float64(), nullable=False),
        pa.field("is_anomalous", pa.bool_(), nullable=False),
        pa.field("anomaly_map", pa.list_(pa.float32())),
        pa.field("map_height", pa.int32(), nullable=False),
        pa.field("map_width", pa.int32(), nullable=False),
        pa.field("peak_y", pa.float32(), nullable=False),
        pa.field("peak_x", pa.float32(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
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
    ]
)
