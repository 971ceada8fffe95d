"""The format on disk: .bin/.idx shards with scores, manifests and build records.

Needs numpy only.
"""
