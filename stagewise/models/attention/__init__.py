"""Which attention implementation runs, its masks, and positions."""
