"""Pooling that keeps a byte an output for its backward pass."""
