"""Describe and verify shards: counts, distributions, damage."""
