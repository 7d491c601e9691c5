"""Loading the weights of a language model or a reward model: precision, placement, missing weights."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from loguru import logger
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stagewise.artifacts.manifest import parameters_of
from stagewise.artifacts.weight_files import check_hashes
from stagewise.config.arguments import ModelArguments
from stagewise.errors import ModelError
from stagewise.models.attention.choose import choose_attention
from stagewise.models.config import DTYPES, load_config
from stagewise.models.hub import find_source, hub_options
from stagewise.models.quantization.bnb import guard_4bit, guard_8bit, quantization_options
from stagewise.models.quantization.experts import QuantizedExperts
from stagewise.models.reward_head import Float32Linear, reward_config, whole_weights
from stagewise.models.tokenizer import check_vocabulary


def load_causal_lm(
    args: ModelArguments,
    *,
    attn_implementation: str | None = None,
    for_training: bool = True,
    deepspeed_zero3: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in the precision of --torch_dtype.

    Args:
        args: the model flags.
        attn_implementation: default: the result of `choose_attention`.
        for_training: returns the model in train mode and refuses a placement with weights on disk.
        deepspeed_zero3: the weights are partitioned while they load; --device_map is refused.
        tokenizer: if given, its length is checked against the rows of the embedding.

    Raises:
        ModelError: also if weights are missing from the checkpoint, which transformers would initialize randomly.
    """
    config = load_config(args)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise ModelError(f"--model_name_or_path {args.model_name_or_path}: a reward model has no language-model head")
    model, missing = _load(AutoModelForCausalLM, args, config, attn_implementation, for_training, deepspeed_zero3)
    if missing:
        raise ModelError(f"--model_name_or_path {args.model_name_or_path}: the checkpoint lacks {_listed(missing)}")
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    return model


def load_reward_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attn_implementation: str | None = None,
    for_training: bool = True,
    deepspeed_zero3: bool = False,
    float32_head: bool = True,
) -> PreTrainedModel:
    """Loads a model with one scalar score, read at a row's last non-padding token.

    The head `score` is kept if the checkpoint has one, otherwise it is new, which is logged.

    Args:
        float32_head: a new head's updates are too small for 16 bit. False if DeepSpeed's ZeRO-3 trains all weights: it
            takes trained parameters of one precision only, and keeps a float32 copy of them itself.

    Raises:
        ModelError: also for an architecture without a sequence-classification class.
    """
    config = reward_config(load_config(args), tokenizer, args.model_name_or_path)
    auto = AutoModelForSequenceClassification
    model, missing = _load(auto, args, config, attn_implementation, for_training, deepspeed_zero3)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(f"--model_name_or_path: {type(model).__name__} has no linear head named `score`")
    lost = sorted(name for name in missing if name != "score.weight")
    if lost:
        raise ModelError(f"--model_name_or_path {args.model_name_or_path}: the checkpoint lacks {_listed(lost)}")
    check_vocabulary(model, tokenizer)
    logger.info(f"reward head: {'new' if missing else 'from the checkpoint'}")
    if for_training and float32_head and model.score.weight.dtype != torch.float32:
        with whole_weights(model.score):
            weight = model.score.weight.detach().float().clone()
        head = Float32Linear(weight.shape[1], len(weight), bias=False, device=weight.device)
        head.weight = nn.Parameter(weight)
        model.score = head
    return model


def _load(
    auto: type, args: ModelArguments, config: PretrainedConfig, attention: str | None, for_training: bool, zero3: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the weights; returns the model and the names missing from the checkpoint."""
    source = find_source(args.model_name_or_path, args)
    attention = attention or choose_attention(config, args)
    dtype = "auto" if args.torch_dtype == "auto" else DTYPES[args.torch_dtype]
    options = {**quantization_options(args, config), **hub_options(source, args)}
    if os.path.isdir(source):
        check_hashes(Path(source))
    with _report() as told:
        try:
            model, info = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                device_map=choose_device_map(args, deepspeed_zero3=zero3),
                output_loading_info=True,
                **options,
            )
        except torch.OutOfMemoryError:
            raise  # the run has its own hint
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            report = "".join(told) if "above report" in str(error) else ""
            if full := re.search(r"OutOfMemoryError: (.*)", report):
                raise torch.OutOfMemoryError(full[1]) from error
            raise ModelError("\n".join(filter(None, (f"--model_name_or_path {source}: {error}", report)))) from error
    guard_4bit(model)
    guard_8bit(model)
    if experts := [module for module in model.modules() if isinstance(module, QuantizedExperts)]:
        count = sum(len(module.states) for module in experts)
        logger.info(f"experts: {count} 3-D parameters in 4 bit (--quantize_experts False leaves them)")
    held = f", linear layers in {args.bits} bit" if args.bits else ""
    placed = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if for_training and len(placed) > 1 and placed & {"cpu", "disk"}:
        raise ModelError(
            f"--device_map {args.device_map}: the model does not fit on the GPUs ({', '.join(sorted(placed))})"
        )
    model.train(for_training)
    size = parameters_of(model)["all"]
    logger.info(
        f"model: {source}, {type(model).__name__}, {size / 1e6:,.1f} M parameters in {model.dtype}{held}, {attention}"
    )
    return model, sorted(info["missing_keys"])


@contextmanager
def _report() -> Iterator[list[str]]:
    """Captures transformers' log of loading weights: its errors refer to it, and its log is off."""
    told: list[str] = []
    log, handler = logging.getLogger("transformers.modeling_utils"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    before = log.level, log.propagate
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def choose_device_map(args: ModelArguments, *, deepspeed_zero3: bool = False) -> str | dict[str, Any] | None:
    """The device map for from_pretrained; each of several processes holds its own complete model.

    Raises:
        ModelError: for a map without effect.
    """
    if args.device_map in (None, "", "None", "none"):
        # bitsandbytes quantizes on the device where the model then stays; --use_cpu is only in accelerate's state.
        return {"": PartialState().device} if args.bits and PartialState._shared_state else None
    if deepspeed_zero3:
        raise ModelError("--device_map has no effect under ZeRO-3, which places the weights: leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if args.device_map != "auto":
            raise ModelError(f"--device_map {args.device_map} has no effect with several processes: leave it out")
        logger.info("--device_map auto: each process holds the whole model on its own device")
        return None
    return args.device_map


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
