"""Frozen things: backbone, instance encoder, and where virtual tokens go. torch and transformers only."""
