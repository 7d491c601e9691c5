"""Records to encoded examples, and examples to packed rows."""
