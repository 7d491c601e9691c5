"""Where a model comes from, its config, loading, heads, and the forward pass."""
