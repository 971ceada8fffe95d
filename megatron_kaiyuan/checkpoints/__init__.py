"""The other format on disk: read, recover, identify and average torch_dist checkpoints."""
