"""Marks in finished checkpoints by the least change of the weights, without training."""
