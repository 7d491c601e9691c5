"""--dry_run: measures part of a batch and estimates the run's time and memory."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from loguru import logger
from transformers import PreTrainedModel, Trainer

from stagewise.data.examples import IGNORE_INDEX

SHORT = 256  # tokens of a packed row that are measured on a CPU
LONG = 20.0  # seconds of a batch that is not measured a second time
GIB = 2**30


def dry_run(trainer: Trainer, peak_gib: Callable[[], float]) -> None:
    """Measures one batch forward and backward and an optimizer step, and logs the time and memory of the whole run.

    On a CPU, where a batch can take minutes, one short row is measured and scaled to the batch's work; on a GPU the
    batch itself, whose memory is then exact. The optimizer steps at a learning rate of zero: no weight changes.
    """
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    loader = trainer.get_train_dataloader()
    steps = args.max_steps
    if steps <= 0:  # a stream has no length, and needs --max_steps
        updates = math.ceil(len(loader) / args.gradient_accumulation_steps)
        steps = math.ceil(args.num_train_epochs * updates)
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    model = trainer.model.to(args.device)
    schedule = getattr(trainer, "schedule", None)  # of PPO, whose batches come from a rollout
    if schedule is not None:
        logger.info("dry run: makes one rollout first")
    started = time.perf_counter()
    batch = next(iter(loader))
    rollout = 0.0 if schedule is None else (time.perf_counter() - started) / schedule.minibatches
    short = short_batch(trainer, batch) if args.device.type == "cpu" else None
    logger.info(
        f"dry run: measures {describe_measurement(short, batch)}, forward and backward; nothing is trained or written"
    )
    loss, seconds, held, grown = measure(trainer, short or batch)
    optimizer, state = measure_optimizer(trainer)
    repeats = short is not None or seconds < LONG
    if repeats:  # the first pass also compiles or loads kernels, and had no optimizer state beside it
        if args.gradient_accumulation_steps == 1:
            model.zero_grad()  # as before each step
        loss, seconds, held, grown = measure(trainer, short or batch)
    share = 1.0 if short is None else count_operations(batch, model) / count_operations(short, model)
    tokens = 1.0 if short is None else batch["input_ids"].numel() / short["input_ids"].numel()
    peak = peak_gib() if repeats else peak_gib() + state / GIB
    if short is not None:
        peak = max(peak, (held + grown * tokens) / GIB)
    step = (seconds * share + rollout) * args.gradient_accumulation_steps + optimizer
    logger.info(f"dry run: measured {seconds:.2f} s, loss {loss:.4f}; a step of the run takes about {step:.1f} s")
    logger.info(
        f"dry run: {steps} steps, about {step * steps / 60:.1f} minutes and {peak:.1f} GiB per process "
        f"({args.device.type})"
    )
    if trainer.is_world_process_zero() and output_dir.is_dir() and not any(output_dir.iterdir()):
        output_dir.rmdir()  # the Trainer created it


def measure_optimizer(trainer: Trainer) -> tuple[float, int]:
    """Seconds of an optimizer step, and bytes of the optimizer's state; the weights do not change.

    Uses the gradients of `measure`. The first step allocates the state, the second one is timed.
    """
    optimizer = trainer.create_optimizer()
    if not isinstance(optimizer, torch.optim.Optimizer):  # a placeholder for the one that DeepSpeed makes
        return 0.0, 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    device = trainer.args.device.type
    for _ in range(2):
        started = time.perf_counter()
        optimizer.step()
        if device != "cpu":
            getattr(torch, device).synchronize()
        seconds = time.perf_counter() - started
    state = sum(
        value.numel() * value.element_size()
        for tensors in optimizer.state.values()
        for value in tensors.values()
        if torch.is_tensor(value)
    )
    return seconds, state


def short_batch(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first SHORT tokens of a packed batch, or the training set's first record; None if neither is shorter.

    A packed row (1, T) is cut after a token with a label; a padded record or a pair of answers is used as a whole.
    """
    if hasattr(trainer, "schedule"):
        return None  # a rollout's batch consists of responses
    length = batch["input_ids"].shape[-1]
    if "position_ids" in batch and "attention_mask" not in batch:
        labeled = (batch["labels"][0] != IGNORE_INDEX).nonzero()
        end = max(SHORT, int(labeled[0]) + 1 if len(labeled) else length)
        short = {
            name: value[:, :end] if torch.is_tensor(value) and value.shape == (1, length) else value
            for name, value in batch.items()
        }
    else:
        short = dict(trainer.data_collator([trainer.train_dataset[0]]))
    return short if short["input_ids"].numel() < batch["input_ids"].numel() else None


def measure(trainer: Trainer, batch: Mapping[str, Any]) -> tuple[float, float, int, int]:
    """Loss, seconds, bytes held before, and bytes grown by, of one forward and backward pass."""
    process, most, done = psutil.Process(), [0], threading.Event()
    release_freed_memory()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    inputs = trainer._prepare_inputs(batch)
    with trainer.accelerator.autocast():  # in training, accelerate wraps the model in it
        loss = trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=count)
    loss.backward()
    value = float(loss.detach())  # waits for the device
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return value, seconds, before, max(0, most[0] - before)


def release_freed_memory() -> None:
    """Returns freed memory to the system if the C library can (glibc); memory kept for reuse hides growth."""
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def count_operations(batch: Mapping[str, Any], model: PreTrainedModel) -> float:
    """Floating-point operations of a batch, up to a factor: 6 per weight and token, 12 d per layer and token pair."""
    rows, length = batch["input_ids"].shape
    config = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    tables = model.get_input_embeddings().weight.numel()
    if not config.tie_word_embeddings:
        weights -= tables  # only looked up
    pairs = 12 * config.num_hidden_layers * config.hidden_size * length
    return rows * length * (6 * weights + pairs)


def describe_measurement(short: Mapping[str, Any] | None, batch: Mapping[str, Any]) -> str:
    """A description of what is measured: "256 tokens for a batch of 1 × 2048"."""
    if short is not None:
        rows, length = batch["input_ids"].shape
        return f"{short['input_ids'].numel()} tokens for a batch of {rows} × {length}"
    shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
    return f"one batch {shapes}"
