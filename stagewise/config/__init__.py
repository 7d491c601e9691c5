"""Flags: their dataclasses, how a command line and its files are read, and what is refused before weights load."""
