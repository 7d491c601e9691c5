"""Flags: their dataclasses, command lines and flag files, and checks before weights load."""
