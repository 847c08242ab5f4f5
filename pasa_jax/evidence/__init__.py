"""What the claims rest on: the benchmark of accuracy, and a real language model."""
