"""Merging an adapter into its base: the inputs, and the merge in memory for bases that can't be merged by file.

`stagewise/adapters/merge_sharded.py` merges file by file, `stagewise/adapters/merge_check.py` checks the result.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from peft import PeftConfig
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stagewise.adapters.attach import fold, load_adapter
from stagewise.errors import MergeError
from stagewise.models.loading import guard_4bit


@dataclass
class MergeJob:
    """The inputs of a merge: everything known before a weight of the base is read."""

    base: Path
    name: str  # of the base: its directory or hub name
    adapter: Path
    config: PeftConfig  # the adapter's
    base_config: PretrainedConfig  # with a reward head if the adapter has one
    auto: type
    skeleton: PreTrainedModel  # the model on the meta device
    weights: dict[str, torch.Tensor]  # the adapter's, with the names of the skeleton
    tokenizer: PreTrainedTokenizerBase
    rows: int  # of the merged embedding
    options: dict[str, Any]  # for from_pretrained

    @property
    def scores(self) -> bool:
        return self.auto is AutoModelForSequenceClassification


def quantization(config: PretrainedConfig) -> str | None:
    """The quantization method of a checkpoint, None for plain weights."""
    about = getattr(config, "quantization_config", None)
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    return None if about is None else str(getattr(method, "value", method))


def load_base(job: MergeJob, dtype: torch.dtype | str) -> PreTrainedModel:
    """Loads the base with the rows of the merged embedding; a 4- or 8-bit base is dequantized to float32."""
    method = quantization(job.base_config)
    if method and method != "bitsandbytes":
        raise MergeError(f"--base_model {job.base}: quantized, and not by bitsandbytes; give its 16-bit original")
    if method and importlib.util.find_spec("bitsandbytes") is None:
        raise MergeError(
            f"--base_model {job.base}: quantized by bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or give the 16-bit original, which an adapter is better merged into"
        )
    model = job.auto.from_pretrained(job.base, config=job.base_config, dtype=dtype, **job.options)
    guard_4bit(model)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=torch.float32)
    old = model.get_input_embeddings().weight.shape[0]
    if job.rows != old:
        model.resize_token_embeddings(job.rows, mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight.data[old:] = module.weight.data[:old].float().mean(dim=0).to(module.weight.dtype)
    if job.scores:
        model.score.float()  # kept in its trained precision
    return model.eval()


def merge_and_save(job: MergeJob, folder: Path) -> torch.dtype:
    """Loads the base, merges the adapter and saves the result in `folder`; returns the merged model's precision."""
    quantized = quantization(job.base_config) is not None
    # PiSSA first subtracts from the base what it adds later: in 16 bit the first rounding could not be undone.
    exact = str(getattr(job.config, "init_lora_weights", "")).startswith("pissa")
    model = fold(load_adapter(load_base(job, torch.float32 if exact else "auto"), job.adapter))
    if exact and not quantized:
        model = model.to(job.base_config.dtype or torch.float32)
    if quantized:
        # The dequantized model still has hooks that would quantize it again; its weights go into a plain one.
        del job.skeleton.config.quantization_config
        job.skeleton.load_state_dict(model.state_dict(), assign=True)
        job.skeleton.tie_weights()
        model = job.skeleton.to(torch.bfloat16)
        logger.info("the base is 4 or 8 bit: merged in bfloat16")
    model.save_pretrained(folder)
    return model.dtype
