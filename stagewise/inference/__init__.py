"""Inference: sampling, decoding, batch files, and the interactive prompt."""
