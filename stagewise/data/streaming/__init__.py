"""Encoding and packing during training, for data that is never read as a whole."""
