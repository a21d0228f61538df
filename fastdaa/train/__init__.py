"""Training: packed, prefix-shared preference pairs through any causal language model."""
