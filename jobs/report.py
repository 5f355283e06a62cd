"""Writes one HTML page about the anomaly scores of an archive, and a list of its defects.

python jobs/report.py --scores out --output report.html
python jobs/report.py --scores s3://bucket/out --output s3://bucket/report.html --top 200
python jobs/report.py --scores out --run_id latest --false_discovery_rate 0.05 --defects defects.csv
"""

from csflow.cli import run

if __name__ == "__main__":
    run("report", __doc__)
