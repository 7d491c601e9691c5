"""A model's config.json: its family, and the changes that flags make to it before the weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

import stagewise.models.quantization.row_wise  # noqa: F401  (from_pretrained then knows models saved in that form)
from stagewise.artifacts.json_files import read_object
from stagewise.artifacts.weight_files import AGAIN, check_weight_files
from stagewise.config.arguments import ModelArguments
from stagewise.errors import ModelError
from stagewise.models.attention.rope import scale_rope
from stagewise.models.hub import (
    ANOTHER,
    TRANSFORMERS,
    check_family,
    find_source,
    hub_options,
    no_hub_model,
    refuse_adapter,
    refuse_family,
)
from stagewise.models.router_loss import check_router

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Names that earlier pipelines use for families with another model_type.
MODEL_TYPE_NAMES = {
    "alpaca": ("llama",),
    "vicuna": ("llama",),
    "yi": ("llama",),
    "baichuan": ("baichuan",),
    "chatglm": ("chatglm", "glm"),
    "internlm": ("internlm",),
}


def load_config(args: ModelArguments) -> PretrainedConfig:
    """Loads config.json, checks --model_type against it, and scales positions for --rope_scaling.

    Raises:
        ModelError: for an adapter directory, an architecture unknown to transformers, code that would have to be
            trusted, or another --model_type.
        FileError: a file of a local directory is broken, or names files elsewhere.
    """
    source = find_source(args.model_name_or_path, args)
    refuse_adapter(source)
    refuse_family(source)
    if Path(source).is_dir():
        for name in ("config.json", "generation_config.json"):
            if Path(source, name).exists():
                read_object(Path(source, name), AGAIN)
        check_weight_files(Path(source))
    options = hub_options(source, args)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _unreadable(error, source, options) from error
    check_family(config.model_type, source)
    check_model_type(args, config)
    check_router(args, config)
    scale_rope(config, args)
    return config


def _unreadable(error: Exception, source: str, options: dict[str, Any]) -> ModelError:
    """The error for a model's config.json, reworded where transformers' own message names other flags."""
    place, said = f"--model_name_or_path {source}", " ".join(str(error).split())
    if isinstance(error, OSError) and not Path(source).is_dir():
        return ModelError(f"{place}: {no_hub_model(error)}")
    if isinstance(error, OSError):
        return ModelError(f"{place}: no usable config.json ({said})")
    if needed := own_code(source, options):
        return needed
    kind = PretrainedConfig.get_config_dict(source, **options)[0].get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        return ModelError(
            f"{place}: transformers {TRANSFORMERS} does not know this architecture, {kind!r}; take {ANOTHER}, or a "
            "transformers that has it"
        )
    return ModelError(f"{place}: no usable config.json ({said})")


def own_code(source: str, options: dict[str, Any], flag: str = "model_name_or_path") -> ModelError | None:
    """The reason why a model with its own Python code was not loaded; None for one without, or without config.json.

    Raises:
        ModelError: its family is one whose code no longer runs.
    """
    try:
        entries = PretrainedConfig.get_config_dict(source, **options)[0]
    except OSError:
        return None
    check_family(entries.get("model_type"), source, flag)
    if entries.get("model_type") in CONFIG_MAPPING or not entries.get("auto_map"):
        return None
    if not options["trust_remote_code"]:
        return ModelError(
            f"--{flag} {source}: it ships its own Python code: if you trust it, add --trust_remote_code True"
        )
    return ModelError(
        f"--{flag} {source}: its own Python code does not run with transformers {TRANSFORMERS}; take {ANOTHER}"
    )


def check_model_type(args: ModelArguments, config: PretrainedConfig) -> None:
    """Raises ModelError unless --model_type is auto or names the config's family ("qwen" covers qwen2, qwen3 …)."""
    asked = args.model_type.lower()
    if asked == "auto" or config.model_type.startswith(MODEL_TYPE_NAMES.get(asked, (asked,))):
        return
    raise ModelError(
        f"--model_type {args.model_type}: config.json of {args.model_name_or_path} says {config.model_type!r}; "
        "leave the flag out, or name that"
    )
