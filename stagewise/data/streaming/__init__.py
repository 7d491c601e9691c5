"""Encoding and packing while training, for data that is never read as a whole."""
