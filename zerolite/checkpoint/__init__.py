"""Checkpoints of sharded training, and Hugging Face folders."""
