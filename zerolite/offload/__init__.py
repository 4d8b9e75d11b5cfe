"""Gradients and optimizer states in host memory, stepped there by worker processes."""
