"""Registration of an output's finished Parquet files as tables of Apache Iceberg or Delta Lake."""
