"""The log on stderr, for every script."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from loguru import logger
from transformers.utils import logging as transformers_logging

from stagewise.artifacts.processes import is_main
from stagewise.reports.console import write_log_line
from stagewise.reports.results import has_color
from stagewise.reports.terminal_text import log_visible_text


def set_up_logging() -> None:
    """Sends the log to stderr: everything of the first process, errors of the others."""
    logger.remove()
    log_visible_text()
    level = "INFO" if is_main() else "ERROR"
    color = has_color(sys.stderr)
    logger.add(
        write_log_line, level=level, format="<green>{time:HH:mm:ss}</green> <level>{message}</level>", colorize=color
    )
    transformers_logging.set_verbosity_error()
    # Deprecations inside transformers and PEFT, which users of these scripts cannot act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not torch.accelerator.is_available():
        # accelerate imports DeepSpeed if it is installed, which otherwise warns on stdout that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not is_main() or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
