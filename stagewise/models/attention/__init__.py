"""The attention implementation, masks and positions."""
