"""The data plane: one runtime per replica, with an engine of paged attention and batching."""
