"""Whole training scripts, with the lines that zerolite changes marked: see README.md."""
