"""Checkpoints that count only if they are complete.

A checkpoint is marked once every process has written its part: `whole.json` lists its files with their sizes and
hashes, and is written after they are safely on disk. A run killed while saving leaves a folder without the mark; a
faulty disk or copy leaves files that differ from it. A run continues from the last complete checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.artifacts.file_hashes import ALGORITHM, hash_files
from stagewise.artifacts.json_files import inside, read_object, sync_folder, write_durably
from stagewise.artifacts.processes import from_first_process
from stagewise.config.checks import named_checkpoint
from stagewise.config.flags import NO
from stagewise.errors import ArgumentError, FileError
from stagewise.formats.json_lines import json_bytes

MARK = "whole.json"
LEFT = "left.json"  # the mark's name in a checkpoint that was left behind by a run continuing from an earlier one
WITHOUT = "the checkpoint does not count"
REMOVED = ".removed"  # suffix of a checkpoint whose files are being deleted


def mark_whole(folder: str | Path) -> None:
    """Makes a checkpoint durable and writes its mark: {"optimizer.pt": {"size": 123, "xxh3_128": "0f…"}, …}.

    Raises:
        OSError: a file cannot be read, or the disk is full; then there is no mark.
    """
    folder = Path(folder)
    own = (folder / MARK, folder / (MARK + ".tmp"))  # the latter from a run that was killed while it wrote the mark
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in own]
    hashes = hash_files(files, durable=True)
    about = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, ALGORITHM: found}
        for path, found in hashes.items()
    }
    for place in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        sync_folder(place)
    write_durably(folder / MARK, json_bytes(about, indent=1))


def unmark(folder: str | Path) -> None:
    """Removes the mark before a checkpoint of the same step is overwritten."""
    for name in (MARK, LEFT):
        (Path(folder) / name).unlink(missing_ok=True)


def leave_later(output_dir: str | Path, resume: Path) -> None:
    """Unmarks checkpoints later than the one a run continues from, so that True means the new branch.

    They can still be given by name; see `resume_point`.
    """
    step = trained_steps(resume)
    for folder in checkpoints(output_dir):
        if step_of(folder) > step and (folder / MARK).is_file():
            os.replace(folder / MARK, folder / LEFT)
            logger.info(
                f"{folder} is later than step {step}, from which this run continues: it can now only be given by name"
            )


def trained_steps(folder: Path) -> int:
    """The number of steps that a checkpoint has been trained for, whatever its folder is called.

    Raises:
        FileError: its trainer_state.json does not say.
    """
    path = folder / "trainer_state.json"
    step = read_object(path, WITHOUT).get("global_step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise FileError(f"{path}: expected a number at global_step, found {step!r:.80}; {WITHOUT}")
    return step


def why_not_whole(folder: str | Path, contents: bool = True) -> str | None:
    """The problem with a checkpoint, as the end of a sentence that starts with its name; None if it is complete.

    Args:
        folder: the checkpoint.
        contents: whether to compare its files with their hashes, or only their sizes.
    """
    folder = Path(folder)
    if not (folder / MARK).is_file():
        return f"is not whole: it has no {MARK} (the run ended while it was written)"
    try:
        about = _read_mark(folder)
        for path, expected in about.items():
            if not path.is_file():
                return f"is not whole: {path.relative_to(folder)} is missing"
            if (size := path.stat().st_size) != expected["size"]:
                return f"is not whole: {path.relative_to(folder)} has {size:,} bytes, not {expected['size']:,}"
        hashed = {path: expected[ALGORITHM] for path, expected in about.items() if ALGORITHM in expected}
        if contents and len(hashed) < len(about):
            logger.info(
                f"{folder}: its {MARK} has no hashes, as an earlier version wrote it; its files' sizes are right"
            )
        for path, found in hash_files(hashed if contents else ()).items():
            if found != hashed[path]:
                return f"is damaged: {path.relative_to(folder)} is not what was saved (its hash differs)"
        if contents and folder / "trainer_state.json" in about:
            trained_steps(folder)
    except FileError as error:
        return f"is damaged: {error}"
    except OSError as error:
        return f"cannot be read: {error.filename or MARK}: {error.strerror}"
    return None


def _read_mark(folder: Path) -> dict[Path, dict[str, Any]]:
    """Each file listed in the mark, with its size and, except in earlier versions, its hash."""
    about: dict[Path, dict[str, Any]] = {}
    for name, expected in read_object(folder / MARK, WITHOUT).items():
        expected = expected if isinstance(expected, dict) else {"size": expected}
        if type(expected.get("size")) is not int or not isinstance(expected.get(ALGORITHM, ""), str):
            raise FileError(f"{folder / MARK}: expected a size and a hash of {name!r:.80}; {WITHOUT}")
        about[inside(folder, name, folder / MARK)] = expected
    if not about:
        raise FileError(f"{folder / MARK}: lists no files; {WITHOUT}")
    return about


def is_whole(folder: str | Path, contents: bool = True) -> bool:
    """Whether the checkpoint has its mark and every listed file is as it was written; see `why_not_whole`."""
    return why_not_whole(folder, contents) is None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-N of a run, by ascending N, complete or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(folder: str | Path) -> int:
    """N of a folder checkpoint-N."""
    return int(Path(folder).name.split("-")[1])


def last_whole(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None; logs which ones it skipped and why."""
    for folder in reversed(checkpoints(output_dir)):
        why = why_not_whole(folder)
        if why is None:
            return folder
        if (folder / LEFT).is_file() and not (folder / MARK).is_file():
            why = "was left behind by a run that went on from an earlier one"
        logger.warning(f"{folder} {why}: passed over")
    return None


def resume_point(output_dir: str, asked: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: a folder, or for True the last complete one.

    The first process reads the checkpoints; all processes continue from its choice.

    Returns:
        the checkpoint to continue from, or None to start at the beginning (True with nothing saved yet, or False).

    Raises:
        ArgumentError: the folder named is missing or not whole.
    """
    if asked is None or str(asked).lower() in (*NO, "none", ""):
        return None
    return from_first_process(lambda: _resume_point(output_dir, str(asked)))


def _resume_point(output_dir: str, asked: str) -> Path | None:
    named = named_checkpoint(asked)
    if named is None:
        folder = last_whole(output_dir)
        if folder is None:
            logger.warning(
                f"--resume_from_checkpoint True: {output_dir} holds no complete checkpoint; starting at step 0"
            )
        return folder
    folder = named
    if not (folder / MARK).is_file():
        with suppress(FileNotFoundError):  # not left behind, or another process was first
            os.replace(folder / LEFT, folder / MARK)
    if why := why_not_whole(folder):
        raise ArgumentError(
            f"--resume_from_checkpoint {asked}: this checkpoint {why}; give another, or True for the last complete one"
        )
    return folder


def check_resumable(folder: Path) -> None:
    """Raises ArgumentError for a checkpoint of --save_only_model, which has no optimizer state."""
    if not any(next(folder.glob(pattern), None) for pattern in ("optimizer*", "global_step*")):
        raise ArgumentError(
            f"--resume_from_checkpoint: {folder} was saved with --save_only_model, without the optimizer's state that "
            f"a run continues from; start a new run from its weights: --peft_path {folder}, or --model_name_or_path "
            "if all weights were trained"
        )


def rotate(output_dir: str | Path, keep: int | None, best: str | None = None) -> None:
    """Removes the oldest complete checkpoints beyond `keep`, but never the best or the newest complete one.

    Each is renamed first: a run that is killed meanwhile leaves no checkpoint with half of its files, and the next
    call removes the rest.
    """
    if not keep or keep < 1:
        return
    for folder in Path(output_dir).glob(f"checkpoint-*{REMOVED}"):
        shutil.rmtree(folder)
    whole = [p for p in checkpoints(output_dir) if is_whole(p, contents=False)]
    spare = [p for p in whole[:-1] if best is None or p.resolve() != Path(best).resolve()]
    for folder in spare[: max(0, len(whole) - keep)]:
        shutil.rmtree(folder.rename(folder.with_name(folder.name + REMOVED)))
