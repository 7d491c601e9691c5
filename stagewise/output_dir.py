"""The output directory before a run: what it may hold, and what --overwrite_output_dir takes away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stagewise.arguments import ArgumentError
from stagewise.checkpoint import checkpoints
from stagewise.manifest import read_manifest
from stagewise.settings import StageArguments


def check_output_dir(args: StageArguments) -> None:
    """Raises ArgumentError if the run would write over what is there."""
    folder = Path(args.output_dir)
    # pathlib's own would end with PermissionError below a folder that may not be looked into
    if os.path.isfile(folder):
        raise ArgumentError(f"--output_dir {folder}: is a file; give a folder")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not args.dry_run and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ArgumentError(f"--output_dir {folder}: {there} is no folder that can be written to; give another")
    if args.overwrite_output_dir or args.dry_run or not args.do_train:
        return
    manifest = read_manifest(folder)
    way_out = "--overwrite_output_dir replaces it, another --output_dir keeps it"
    finished = manifest is not None and manifest.get("status") == "finished"
    if args.resume_from_checkpoint and (checkpoints(folder) or not finished):
        return
    if finished:
        raise ArgumentError(f"--output_dir {folder}: holds a finished {manifest.get('stage')} run; {way_out}")
    if checkpoints(folder):
        raise ArgumentError(
            f"--output_dir {folder}: holds {checkpoints(folder)[-1].name} of a run that did not finish; "
            f"--resume_from_checkpoint True goes on from it, {way_out}"
        )
    if not manifest and any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ArgumentError(f"--output_dir {folder}: holds a model that this run did not make; {way_out}")


# What a run writes; --overwrite_output_dir removes these and nothing else. rejected.jsonl is not among them: when this
# happens the data has been read, and the file is this run's.
WRITTEN = (
    *("checkpoint-*", "eval_records", "logs", "rejected-*.jsonl", "*_results.json", "*_results.txt", "loss.png"),
    *("curves.png", "report.html", "eval_samples"),
    *("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json", "model*.safetensors*"),
    *("run.json", "trainer_state.json", "training_args.bin", "ppo_state.pt"),
)


def remove_earlier_run(output_dir: str | Path) -> None:
    """Removes what an earlier run wrote; other files stay."""
    for path in (path for pattern in WRITTEN for path in Path(output_dir).glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
