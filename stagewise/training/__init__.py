"""A training run: Trainers, callbacks, settings, samples."""
