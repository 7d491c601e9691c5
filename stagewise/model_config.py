"""A model's config.json: its family, and what flags change of it before the weights load."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

import stagewise.row_quantisation  # noqa: F401  (from_pretrained then knows models saved in that form)
from stagewise.arguments import ModelArguments
from stagewise.json_files import read_object
from stagewise.model_source import ModelError, find_source, hub_options, refuse_adapter
from stagewise.rope import scale_rope
from stagewise.router import check_router
from stagewise.weight_files import AGAIN, check_weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What earlier pipelines call families whose config.json says something else.
MODEL_TYPE_NAMES = {
    "alpaca": ("llama",),
    "vicuna": ("llama",),
    "yi": ("llama",),
    "baichuan": ("baichuan",),
    "chatglm": ("chatglm", "glm"),
    "internlm": ("internlm",),
}

# Families whose published code needs names that transformers 5 no longer has.
NEEDS_OLD_TRANSFORMERS = frozenset(
    ("chatglm", "baichuan", "qwen", "internlm", "internlm2", "moss", "xverse", "aquila", "orion")
)


def load_config(args: ModelArguments) -> PretrainedConfig:
    """Loads config.json, checks --model_type against it, and scales its positions as --rope_scaling asks.

    Raises:
        ModelError: for an adapter directory, an architecture that transformers does not know, code that would have
            to be trusted, or another --model_type.
        FileError: a file of a local directory is broken, or names files elsewhere.
    """
    source = find_source(args.model_name_or_path, args)
    refuse_adapter(source)
    if Path(source).is_dir():
        for name in ("config.json", "generation_config.json"):
            if Path(source, name).exists():
                read_object(Path(source, name), AGAIN)
        check_weight_files(Path(source))
    try:
        config = AutoConfig.from_pretrained(source, **hub_options(source, args))
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, StrictDataclassError) as error:
        options = hub_options(source, args)
        # What config.json says, which is there unless reading it was the error.
        kind = None if isinstance(error, OSError) else PretrainedConfig.get_config_dict(source, **options)[0]
        kind = (kind or {}).get("model_type")
        if kind in NEEDS_OLD_TRANSFORMERS:
            hint = (
                f"a {kind} model, whose own Python code today's transformers no longer runs; this "
                "version has no code for it: take a later model of the family"
            )
        elif "trust_remote_code" in str(error):
            hint = "it ships its own Python code: if you trust it, add --trust_remote_code True"
        elif "does not recognize this architecture" in str(error):
            hint = f"transformers {transformers.__version__} does not know this architecture"
        else:
            hint = (
                "no usable config.json" if Path(source).is_dir() else "no such directory, and no hub model was found"
            )
        raise ModelError(f"--model_name_or_path {source}: {hint} ({' '.join(str(error).split())})") from error
    check_model_type(args, config)
    check_router(args, config)
    scale_rope(config, args)
    return config


def check_model_type(args: ModelArguments, config: PretrainedConfig) -> None:
    """Raises ModelError unless --model_type is auto or names the config's family ("qwen" takes qwen2, qwen3 …)."""
    asked = args.model_type.lower()
    if asked == "auto" or config.model_type.startswith(MODEL_TYPE_NAMES.get(asked, (asked,))):
        return
    raise ModelError(
        f"--model_type {args.model_type}: config.json of {args.model_name_or_path} says {config.model_type!r}; "
        "leave the flag out, or name that"
    )
