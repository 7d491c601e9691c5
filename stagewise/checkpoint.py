"""Checkpoints that are whole or do not count.

A checkpoint is marked once every process has written its part: `whole.json` lists its files with their sizes. A run
that was killed while it saved leaves a folder without the mark, and the run goes on from the last marked one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from loguru import logger

from stagewise.arguments import ArgumentError

MARK = "whole.json"
LEFT = "left.json"  # what the mark is called of a checkpoint that a run left behind which went on from an earlier one


def mark_whole(folder: str | Path) -> None:
    """Writes the mark of a checkpoint whose files are all on disk."""
    folder = Path(folder)
    temporary = folder / (MARK + ".tmp")
    own = (folder / MARK, temporary)  # the latter of a run that was killed while it wrote the mark
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in own]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    temporary.write_text(json.dumps(sizes, indent=1))
    os.replace(temporary, folder / MARK)


def unmark(folder: str | Path) -> None:
    """Takes the mark away before a checkpoint of the same step is written over this one."""
    for name in (MARK, LEFT):
        (Path(folder) / name).unlink(missing_ok=True)


def leave_later(output_dir: str | Path, resume: Path) -> None:
    """Those behind the one that a run goes on from no longer count: True is to go on from the new way, not from them.

    By its name each can be gone on from all the same; see `resume_point`.
    """
    step = json.loads((resume / "trainer_state.json").read_text())["global_step"]
    for folder in checkpoints(output_dir):
        if step_of(folder) > step and (folder / MARK).is_file():
            os.replace(folder / MARK, folder / LEFT)
            logger.info(f"{folder} is behind step {step}, from which this run goes on: it counts by its name alone")


def is_whole(folder: str | Path) -> bool:
    """True if the checkpoint carries its mark and each listed file has the listed size."""
    folder = Path(folder)
    if not (folder / MARK).is_file():
        return False
    sizes = json.loads((folder / MARK).read_text())
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-N of a run, by rising N, whole or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(folder: str | Path) -> int:
    """N of a folder checkpoint-N."""
    return int(Path(folder).name.split("-")[1])


def last_whole(output_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step, or None; says which broken ones it passed over."""
    for folder in reversed(checkpoints(output_dir)):
        if is_whole(folder):
            return folder
        why = "is not whole (the run ended while it was written)"
        if (folder / LEFT).is_file():
            why = "was left behind by a run that went on from an earlier one"
        logger.warning(f"{folder} {why}: passed over")
    return None


def resume_point(output_dir: str, asked: str | None) -> Path | None:
    """What --resume_from_checkpoint means: a folder, or True for the last whole one.

    Returns:
        the checkpoint to go on from, or None to start at the beginning (True with nothing saved yet, or False).

    Raises:
        ArgumentError: the folder named is missing or not whole.
    """
    if asked is None or str(asked).lower() in ("false", "no", "0", ""):
        return None
    if str(asked).lower() in ("true", "yes", "1"):
        folder = last_whole(output_dir)
        if folder is None:
            logger.warning(
                f"--resume_from_checkpoint True: {output_dir} holds no whole checkpoint; starting at step 0"
            )
        return folder
    folder = Path(asked)
    if not folder.is_dir():
        raise ArgumentError(f"--resume_from_checkpoint {asked}: no such folder")
    if not (folder / MARK).is_file():
        with suppress(FileNotFoundError):  # not left behind, or another process was first
            os.replace(folder / LEFT, folder / MARK)
    if not is_whole(folder):
        raise ArgumentError(
            f"--resume_from_checkpoint {asked}: this checkpoint is not whole (no valid {MARK}); "
            "give another, or True for the last whole one"
        )
    return folder


def check_resumable(folder: Path) -> None:
    """Raises ArgumentError for a checkpoint of --save_only_model, which has no state of the optimizer."""
    if not any(next(folder.glob(pattern), None) for pattern in ("optimizer*", "global_step*")):
        raise ArgumentError(
            f"--resume_from_checkpoint: {folder} was saved with --save_only_model, without the optimizer's state that "
            f"a run goes on from; begin anew from its weights: --peft_path {folder}, or --model_name_or_path where "
            "all weights were trained"
        )


def rotate(output_dir: str | Path, keep: int | None, best: str | None = None) -> None:
    """Removes the oldest whole checkpoints beyond `keep`, never the best one, never the newest whole one."""
    if not keep or keep < 1:
        return
    whole = [p for p in checkpoints(output_dir) if is_whole(p)]
    spare = [p for p in whole[:-1] if best is None or p.resolve() != Path(best).resolve()]
    for folder in spare[: max(0, len(whole) - keep)]:
        shutil.rmtree(folder)
