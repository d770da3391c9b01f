"""Sequence parallelism, and less memory for the activations of long sequences."""
