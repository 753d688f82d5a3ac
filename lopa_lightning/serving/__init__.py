"""From a checkpoint to answers: predictions, a bundle to share, and soft prompts without the backbone."""
