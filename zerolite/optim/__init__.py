"""Optimizers over sharded parameters: rules on flat runs, norms and clipping, loss scaling."""
