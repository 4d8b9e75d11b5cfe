"""What training state costs in bytes."""
