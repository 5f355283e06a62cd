"""The output contract of scoring jobs: where files lie below `--output`, what they hold, how to read them."""
