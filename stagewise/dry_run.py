"""--dry_run: one batch, and what the run will take by it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loguru import logger
from transformers import Trainer


def dry_run(trainer: Trainer, peak_gib: Callable[[], float]) -> None:
    """One batch forward and backward, and what the run will take by it; no step is taken."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    loader = trainer.get_train_dataloader()
    steps = args.max_steps
    if steps <= 0:  # a stream has no length, and --max_steps
        updates = math.ceil(len(loader) / args.gradient_accumulation_steps)
        steps = math.ceil(args.num_train_epochs * updates)
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    model = trainer.model.to(args.device)
    started = time.time()
    batch = next(iter(loader))
    count = trainer._get_num_items_in_batch([batch], args.device)
    loss = trainer.compute_loss(model.train(), trainer._prepare_inputs(batch), num_items_in_batch=count)
    loss.backward()
    loss = float(loss.detach())  # waits for the device
    seconds = (time.time() - started) * args.gradient_accumulation_steps * steps
    # Adam keeps two float32 numbers a trained parameter; gradients are in the peak already.
    optimizer = sum(p.numel() for p in model.parameters() if p.requires_grad) * 8 / 2**30
    peak = peak_gib() + optimizer
    shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
    logger.info(f"dry run: one batch {shapes}, loss {loss:.4f}")
    logger.info(
        f"dry run: {steps} steps, about {seconds / 60:.1f} minutes and {peak:.1f} GiB a process "
        f"({args.device.type}); nothing was trained or written"
    )
    if trainer.is_world_process_zero() and output_dir.is_dir() and not any(output_dir.iterdir()):
        output_dir.rmdir()  # the Trainer made it
