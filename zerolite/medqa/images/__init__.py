"""Rows with images: files, what a row says of them, what a model's folder makes of them, and the part that sees."""
