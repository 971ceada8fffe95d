"""What a run says of itself: losses by source and band, activations, headroom, held-out losses, metrics.jsonl."""
