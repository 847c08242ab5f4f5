"""Evidence for the claims: the benchmark of accuracy, and a real language model."""
