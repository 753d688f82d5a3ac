"""The frozen instance encoder, and the cache of its vectors."""
