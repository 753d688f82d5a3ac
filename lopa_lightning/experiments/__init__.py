"""Makes many runs: methods compared on tasks, seeds and learning rates."""
