"""Scoring of image archives: plan, score shard by shard, account for every image."""
