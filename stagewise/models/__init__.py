"""Finding a model, its config, loading it, its heads, and the forward pass."""
