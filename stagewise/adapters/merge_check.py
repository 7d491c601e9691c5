"""Checks that a merged model equals its base with the adapter: both are run in float32 on the same prompts."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from loguru import logger
from transformers import PreTrainedModel

from stagewise.adapters.attach import load_adapter
from stagewise.adapters.merge import MergeJob, load_base
from stagewise.errors import MergeError

TOLERANCE = 2e-4  # relative to the largest logit, or absolute for scores below 1
PROMPTS = (
    "Drink enough water, sleep well, and ask a doctor",
    "多喝水,好好休息。",
    "def add(a, b):\n    return a + b\n",
)


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """Logits of every position of every prompt, (tokens, V), or of every prompt, (prompts, labels)."""
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in prompts]
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])


def check_merged(job: MergeJob, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Compares merged with base + adapter in float32, one model in memory at a time.

    Rounding merged weights to the base's 16 bit changes the logits more than a small mistake would. So base + adapter
    is also merged by PEFT and rounded here: the tolerance applies to the difference between that and the merged model.

    Raises:
        MergeError: if the difference is above the tolerance, or NaN.
    """
    rows = job.skeleton.get_input_embeddings().weight.shape[0]
    texts = PROMPTS if job.scores else ["\n".join(PROMPTS)]  # one score per text, one row of logits per token
    prompts = [[i for i in job.tokenizer(text).input_ids if i < rows] or [0] for text in texts]
    wrapped = load_adapter(load_base(job, torch.float32), job.adapter)
    expected = rounded = logits_of(wrapped, prompts)
    with wrapped.disable_adapter():
        effect = largest(expected - logits_of(wrapped, prompts))
    if dtype != torch.float32:
        wrapped.merge_adapter()
        for name, parameter in wrapped.named_parameters():
            if ".score." not in name:
                parameter.data = parameter.data.to(dtype).float()
        rounded = logits_of(wrapped, prompts)
    del wrapped
    merged = job.auto.from_pretrained(folder, dtype=torch.float32, **{**job.options, "local_files_only": True}).eval()
    found = logits_of(merged, prompts)
    difference, left = largest(found - expected), largest(found - rounded)
    # float32 sums in another order may round differently
    tolerance = TOLERANCE * max(1.0, largest(expected)) + 0.1 * largest(rounded - expected)
    told = f"largest difference of the logits {difference:.2e}"
    if dtype != torch.float32:
        told += f", {left:.2e} beyond rounding to {str(dtype).removeprefix('torch.')}"
    told += f", tolerance {tolerance:.2e}"
    if not (math.isfinite(tolerance) and left <= tolerance):
        raise MergeError(f"merged is not base + adapter: {told}. Is --base_model the one that it was trained on?")
    logger.info(f"merged = base + adapter in float32: {told}; the adapter moves them by up to {effect:.2e}")
    figures = {"largest_difference": difference, "beyond_rounding": left, "tolerance": tolerance}
    return {**figures, "adapter_effect": effect}


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()
