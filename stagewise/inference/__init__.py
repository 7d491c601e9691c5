"""Sampling, decoding, batch files, and the interactive prompt."""
