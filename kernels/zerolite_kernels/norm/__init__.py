"""Sums of squares of gradients on a GPU, the bits that the host kernels give."""
