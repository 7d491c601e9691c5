"""From records to encoded examples, and from examples to packed rows."""
