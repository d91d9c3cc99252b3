"""Pre-sharded, verified model weights on disk. Imports nothing of the other parts."""
