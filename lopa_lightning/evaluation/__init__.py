"""What scores an output."""
