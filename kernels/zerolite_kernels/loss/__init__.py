"""Output layer and cross-entropy in one, without the whole logits. See cross_entropy.py."""

from zerolite_kernels.loss.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
