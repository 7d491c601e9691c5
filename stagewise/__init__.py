"""What the stage scripts import: data path, model loading, adapters, losses, checkpoints."""

__version__ = "0.1.0"
