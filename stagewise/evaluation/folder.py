"""The files of an evaluation while it runs, and how they replace those of an earlier one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import PartialState

from stagewise.artifacts.processes import from_first_process
from stagewise.errors import ArgumentError
from stagewise.evaluation.arguments import EvaluationJob
from stagewise.evaluation.compare import METRICS, PARTS

PAGE = "examples.html"
COMPARISON = ("comparison.json", "comparison.md", "comparison.png")
WRITTEN = (METRICS, PAGE, "rejected.jsonl", *(name for name, _ in PARTS.values()), *COMPARISON)


@contextmanager
def output_folder(job: EvaluationJob) -> Iterator[None]:
    """The context in which `job.work` is filled; at its end the content moves to --output_dir, completely or not at
    all.

    An earlier evaluation stays untouched until then. Only the first process creates, fills and moves the folder.

    Raises:
        ArgumentError: if --output_dir holds an evaluation that must not be replaced, or is a file.
    """
    if job.args.compare:  # no other process takes part in this
        begin_folder(job)
    else:
        from_first_process(partial(begin_folder, job))
    first = bool(job.args.compare) or PartialState().is_main_process
    try:
        yield
        for name in WRITTEN if first else ():
            (job.folder / name).unlink(missing_ok=True)
        for name in reversed(WRITTEN) if first else ():  # metrics.json last: if it exists, so does the rest
            if (job.work / name).exists():
                os.replace(job.work / name, job.folder / name)
    finally:
        if first:
            shutil.rmtree(job.work, ignore_errors=True)


def begin_folder(job: EvaluationJob) -> None:
    """Creates `job.work`, empty. Raises ArgumentError if --output_dir cannot be written to."""
    folder, done = job.folder, [name for name in (METRICS, *COMPARISON) if (job.folder / name).exists()]
    if folder.is_file():
        raise ArgumentError(f"--output_dir {folder}: is a file; give a folder")
    if done and not job.args.overwrite_output_dir:
        raise ArgumentError(
            f"--output_dir {folder}: holds an evaluation ({done[0]}); --overwrite_output_dir replaces it, another "
            "--output_dir keeps it"
        )
    if folder.resolve() in [Path(each).resolve() for each in job.args.compare]:
        raise ArgumentError(f"--output_dir {folder}: is one of those compared; give another folder")
    shutil.rmtree(job.work, ignore_errors=True)
    try:
        job.work.mkdir(parents=True)
    except OSError as error:
        raise ArgumentError(f"--output_dir {folder}: {error.strerror or error}") from error
