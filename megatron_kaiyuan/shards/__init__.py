"""The format on disk: .bin/.idx shards with scores, manifests and build records; numpy only."""
