"""Resuming: the run that a checkpoint belongs to, and its position in the data."""
