"""Many runs: methods compared on tasks, seeds and learning rates."""
