"""What a run leaves behind: run.json, checkpoints, hashes, directories that appear whole, lock files."""
