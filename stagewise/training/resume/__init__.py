"""Which run a checkpoint belongs to, and where in the data it stands."""
