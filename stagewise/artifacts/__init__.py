"""What a run writes: run.json, checkpoints, hashes, atomic directories, lock files."""
