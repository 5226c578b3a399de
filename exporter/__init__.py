"""Makes a bundle out of a checkpoint, and proves that it computes the same."""
