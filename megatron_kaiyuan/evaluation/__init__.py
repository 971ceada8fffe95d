"""Open the model of a checkpoint, score held-out documents with it, and continue text."""
