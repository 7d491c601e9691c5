"""The output directory before a run: what it may contain, and what --overwrite_output_dir removes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.artifacts.checkpoints import checkpoints
from stagewise.artifacts.manifest import MANIFEST, read_manifest
from stagewise.artifacts.processes import from_first_process
from stagewise.config.flags import YES
from stagewise.errors import ArgumentError
from stagewise.training.settings import StageArguments


def check_output_dir(args: StageArguments) -> None:
    """Raises ArgumentError if the run would overwrite existing results."""
    folder = Path(args.output_dir)
    # pathlib's own raises PermissionError below a folder without permissions
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
            f"--resume_from_checkpoint True continues from it, {way_out}"
        )
    if not manifest and any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ArgumentError(f"--output_dir {folder}: holds a model that this run did not make; {way_out}")


HOW = ("resume_from_checkpoint", "quiet")  # flags that affect how a run is executed, not its result


def is_already_finished(args: StageArguments, stage: str, flags: dict[str, Any]) -> bool:
    """Whether --resume_from_checkpoint True finds a finished run with the same flags or steps; logs it then.

    Args:
        args: the Trainer's arguments.
        stage: the name of this stage.
        flags: the flags of the command line, with their values.
    """
    if args.resume_from_checkpoint is None or args.overwrite_output_dir or args.dry_run or not args.do_train:
        return False
    if str(args.resume_from_checkpoint).lower() not in YES:
        return False
    return from_first_process(lambda: _is_same(args, flags) and is_finished(args.output_dir, stage))


def _is_same(args: StageArguments, flags: dict[str, Any]) -> bool:
    manifest = _manifest(args.output_dir)
    before, now = (
        {name: value for name, value in given.items() if name not in HOW}
        for given in (manifest.get("flags") or {}, json.loads(json.dumps(flags, default=str)))
    )
    return before == now or manifest.get("steps") == args.max_steps


def is_finished(folder: str | Path, stage: str) -> bool:
    """Whether a directory holds all results of a finished run of the stage; logs it then."""
    folder, manifest = Path(folder), _manifest(folder)
    has_model = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    if (manifest.get("status"), manifest.get("stage")) != ("finished", stage) or not has_model:
        return False
    logger.info(
        f"{folder}: this run is finished already, after {manifest.get('steps')} steps; nothing was changed. Raise "
        "--num_train_epochs or --max_steps to train on"
    )
    return True


def _manifest(folder: str | Path) -> dict[str, Any]:
    # Path.is_file raises PermissionError below a folder without permissions
    return (read_manifest(folder) or {}) if os.path.isfile(os.path.join(folder, MANIFEST)) else {}


# What a run writes; --overwrite_output_dir removes these and nothing else. rejected.jsonl is not among them: at this
# point the data has been read, and the file belongs to this run.
WRITTEN = (
    *("checkpoint-*", "eval_records", "logs", "rejected-*.jsonl", "*_results.json", "*_results.txt", "loss.png"),
    *("curves.png", "report.html", "eval_samples"),
    *("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json", "model*.safetensors*"),
    *("run.json", "trainer_state.json", "training_args.bin", "ppo_state.pt"),
)


def remove_earlier_run(output_dir: str | Path) -> None:
    """Removes the results of an earlier run; other files stay."""
    for path in (path for pattern in WRITTEN for path in Path(output_dir).glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
