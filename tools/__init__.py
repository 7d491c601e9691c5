"""Smaller commands: `python -m tools.fetch_small_model`, `python -m tools.report`."""
