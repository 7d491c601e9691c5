"""What merging an adapter into its base is about, and how it is done in memory, where a base's files don't allow more.

`stagewise/adapters/merge_sharded.py` merges file by file, `stagewise/adapters/merge_check.py` compares what came out.
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
class Job:
    """What is merged: everything that was found out before a weight of the base was read."""

    base: Path
    name: str  # of the base: its directory, or its name on the hub
    adapter: Path
    config: PeftConfig  # the adapter's
    base_config: PretrainedConfig  # with a reward head where the adapter has one
    auto: type
    skeleton: PreTrainedModel  # the model without weights
    weights: dict[str, torch.Tensor]  # the adapter's, named as in the skeleton
    tokenizer: PreTrainedTokenizerBase
    rows: int  # of the merged embedding
    options: dict[str, Any]  # for from_pretrained

    @property
    def scores(self) -> bool:
        return self.auto is AutoModelForSequenceClassification


def quantization(config: PretrainedConfig) -> str | None:
    """What a checkpoint was quantized by, None for plain weights."""
    about = getattr(config, "quantization_config", None)
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    return None if about is None else str(getattr(method, "value", method))


def load_base(job: Job, dtype: torch.dtype | str) -> PreTrainedModel:
    """The base with the merged embedding's rows; a 4- or 8-bit base comes back in float32."""
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
        model.score.float()  # kept as it was trained
    return model.eval()


def merge_and_save(job: Job, folder: Path) -> torch.dtype:
    """Loads the base, adds the adapter to it and saves it in `folder`; returns the merged model's precision."""
    quantized = quantization(job.base_config) is not None
    # PiSSA first takes from the base what it then adds to: in 16 bit the first rounding would not be undone.
    exact = str(getattr(job.config, "init_lora_weights", "")).startswith("pissa")
    model = fold(load_adapter(load_base(job, torch.float32 if exact else "auto"), job.adapter))
    if exact and not quantized:
        model = model.to(job.base_config.dtype or torch.float32)
    if quantized:
        # The dequantized model still carries what turns it back; its weights go into a plain one.
        del job.skeleton.config.quantization_config
        job.skeleton.load_state_dict(model.state_dict(), assign=True)
        job.skeleton.tie_weights()
        model = job.skeleton.to(torch.bfloat16)
        logger.info("the base is 4 or 8 bit: merged in bfloat16")
    model.save_pretrained(folder)
    return model.dtype
