"""Training runs: Trainers, callbacks, settings, samples."""
