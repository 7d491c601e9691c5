"""Where a model lies: a local directory, a Hugging Face hub or mirror, or ModelScope."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from loguru import logger
from packaging.version import Version

from stagewise.arguments import ArgumentError, ModelArguments

# The lower bound of requirements.txt: names and defaults of loading differ before it.
if Version(transformers.__version__) < Version("5.17"):
    raise ImportError(f"transformers {transformers.__version__} is too old: pip install 'transformers>=5.17'")

MODELSCOPE_PREFIX = "modelscope://"


class ModelError(ArgumentError):
    """A model or tokenizer that cannot be used; the message names the flag, what was found and what to do."""


def find_source(name: str, args: ModelArguments, flag: str = "model_name_or_path") -> str:
    """Returns a local directory, or the hub name that the hub's own client resolves (HF_ENDPOINT mirrors included).

    A name with the prefix `modelscope://`, or any hub name while USE_MODELSCOPE_HUB=1, is downloaded from ModelScope.

    Raises:
        ModelError: for a directory that is not there, an adapter directory, or ModelScope without its package.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelError(f"--{flag} {name}: expected a directory with config.json, found a file")
    wanted = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes", "on")
    if name.startswith(MODELSCOPE_PREFIX) or (wanted and name.count("/") == 1):
        return _download_modelscope(name.removeprefix(MODELSCOPE_PREFIX), args, flag)
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ModelError(f"--{flag} {name}: no such directory")
    return name


def _download_modelscope(name: str, args: ModelArguments, flag: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"--{flag} {name}: ModelScope was asked for; its package is missing: pip install modelscope"
        ) from error
    revision = None if args.model_revision == "main" else args.model_revision  # ModelScope's own default is "master"
    logger.info(f"model: {name} from ModelScope")
    return snapshot_download(name, cache_dir=args.cache_dir, revision=revision)


def hub_options(source: str, args: ModelArguments) -> dict[str, Any]:
    """Keyword arguments of from_pretrained; nothing asks a hub for a local directory."""
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if Path(source).is_dir():
        return {**options, "local_files_only": True}
    return {**options, "revision": args.model_revision, "token": args.hf_hub_token, "cache_dir": args.cache_dir}


def refuse_adapter(source: str, flag: str = "model_name_or_path") -> None:
    """Raises ModelError if `source` is an adapter's directory, with the command that merges it."""
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"--{flag} {source}: this is an adapter, not a model. Merge it first: "
            f"python merge_peft_adapter.py --lora_model {source} --output_dir {str(folder).rstrip('/')}-merged"
        )
