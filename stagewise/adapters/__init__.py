"""Adapters: attaching, saving, and merging them."""
