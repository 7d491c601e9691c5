"""From flags to a model for inference: base, positions, adapter, tokenizer and chat template."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loguru import logger
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stagewise.adapters.attach import load_adapter, merge_in_memory
from stagewise.adapters.files import read_adapter_config, task_of
from stagewise.artifacts.manifest import read_manifest
from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.select import choose_template
from stagewise.config.arguments import ChatArguments, ModelArguments
from stagewise.config.checks import check_choice, check_shared
from stagewise.errors import AdapterError, ArgumentError, ChatModelError
from stagewise.inference.arguments import ChatModelArguments
from stagewise.models.hub import find_source, no_hub_model
from stagewise.models.loading import load_causal_lm
from stagewise.models.tokenizer import load_tokenizer

USUAL_FACTOR = 2.0
WAITING = timedelta(days=7)  # for processes with longer answers, or a larger share
# The shared loaders' name of a flag -> its name here.
FLAGS = {"model_name_or_path": "base_model", "tokenizer_name_or_path": "tokenizer_path", "peft_path": "lora_model"}
Parts = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, AnyTemplate]


def load_parts(args: ChatModelArguments) -> Parts:
    """Model (with its adapter, on its device), tokenizer and chat template.

    Raises:
        ChatModelError: with the flag of what cannot be loaded; before weights are read if possible.
    """
    try:
        return _load(copy.copy(args))
    except ArgumentError as error:
        text = str(error)
        for theirs, ours in FLAGS.items():
            text = text.replace(f"--{theirs}", f"--{ours}")
        raise ChatModelError(explain_missing_base(text, args.lora_model, given=bool(args.base_model))) from error


def explain_missing_base(text: str, adapter: str | None, *, given: bool) -> str:
    """An error's message, extended by the origin of the base's name if no flag gave it and the base is missing."""
    if given or not adapter or "no such directory" not in text or text.startswith("--lora_model"):
        return text
    return f"{text}; --lora_model {adapter} names this base, which may have moved: give --base_model"


def _load(args: ChatModelArguments) -> Parts:
    device = choose_device(args)
    adapter, config = find_adapter(args)
    args.base_model = args.base_model or (config.base_model_name_or_path if config else None)
    if not args.base_model:
        raise ChatModelError("--base_model: missing; give a model directory or a hub name")
    folder = Path(args.base_model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ChatModelError(f"--base_model {folder}: this is an adapter; give it as --lora_model")
    if adapter and args.tokenizer_path is None and (Path(adapter) / "tokenizer_config.json").is_file():
        args.tokenizer_path = adapter
    about = (read_manifest(adapter) if adapter else None) or {}
    loading = loader_arguments(args)
    loading.kept_rope = about.get("rope")
    check_shared(loading)
    settle_factor(loading)
    tokenizer = load_tokenizer(loading)
    chat = ChatArguments(args.template_name, args.force_template, args.enable_thinking)
    template = choose_template(tokenizer, chat, adapter)
    if args.load_in_8bit:  # otherwise one line per layer and token about its own casts
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = load_causal_lm(loading, for_training=False, tokenizer=tokenizer)
    if not getattr(model, "hf_device_map", None):
        model.to(device)
    model = merge_predecessor_of(model, args, about)
    if adapter:
        model = load_adapter(model, adapter)
        logger.info(f"adapter: {adapter}, {config.peft_type.value}")
    return model.eval(), tokenizer, template


def loader_arguments(args: ChatModelArguments) -> ModelArguments:
    """The flags in the form that the shared loaders take."""
    names = ("torch_dtype", "load_in_4bit", "load_in_8bit", "rope_scaling", "rope_factor", "rope_factors_file")
    names += ("flash_attn", "device_map", "trust_remote_code", "model_revision", "hf_hub_token", "cache_dir")
    if args.load_in_4bit and args.load_in_8bit:
        raise ChatModelError("--load_in_4bit and --load_in_8bit are both given: give one of them")
    shared = {name: getattr(args, name) for name in names}
    return ModelArguments(args.base_model, tokenizer_name_or_path=args.tokenizer_path, **shared)


def choose_device(args: ChatModelArguments) -> torch.device:
    """This process's device. Also creates accelerate's state, through which several processes communicate.

    Raises:
        ChatModelError: for a missing GPU.
    """
    check_choice("device", args.device, ("auto", "cpu", "cuda"))
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        raise ChatModelError("--device cuda: there is no CUDA GPU here; leave it out, or --device cpu")
    placed = args.device_map not in (None, "", "None", "none")
    if args.device == "cpu" and placed:
        raise ChatModelError("--device_map places a model on GPUs: it has no effect with --device cpu, leave one out")
    if placed and not gpu:
        raise ChatModelError("--device_map places a model on GPUs: there is none here, leave it out")
    if args.device == "cpu" and args.flash_attn and gpu:
        raise ChatModelError("--flash_attn needs a GPU: it has no effect with --device cpu, leave one out")
    on_cpu = args.device == "cpu" or not gpu
    state = PartialState(cpu=on_cpu, timeout=WAITING)
    if on_cpu or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return torch.device("cpu") if on_cpu else state.device
    return torch.device("cuda", torch.cuda.current_device())


def find_adapter(args: ChatModelArguments) -> tuple[str | None, PeftConfig | None]:
    """Like `local_adapter`, for a language model.

    Raises:
        ChatModelError: if it is not an adapter, or that of a reward model.
    """
    source, config = local_adapter(args)
    if config is not None and task_of(config) == "SEQ_CLS":
        raise ChatModelError(f"--lora_model {source}: an adapter of a reward model, which gives scores and no text")
    return source, config


def local_adapter(args: ChatModelArguments) -> tuple[str | None, PeftConfig | None]:
    """The adapter's local directory (a hub name is downloaded, newest version) and its config; None without an
    adapter.

    Raises:
        ChatModelError: if it is not an adapter.
    """
    if not args.lora_model:
        return None, None
    hub = replace(loader_arguments(args), model_revision="main")
    source = find_source(args.lora_model, hub, "lora_model")
    if not Path(source).is_dir():
        try:
            source = snapshot_download(source, token=args.hf_hub_token, cache_dir=args.cache_dir)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ChatModelError(f"--lora_model {source}: {no_hub_model(error)}") from error
    try:
        return source, read_adapter_config(source)
    except AdapterError as error:
        raise ChatModelError(f"--lora_model {error}") from error


def settle_factor(args: ModelArguments) -> None:
    """Sets --rope_factor for --rope_scaling if it is missing: an adapter's training value, else 2."""
    if args.rope_scaling is None or args.rope_factor is not None:
        return
    kept = (args.kept_rope or {}).get("rope_parameters", {})
    kept = kept.get("full_attention", kept)
    args.rope_factor = kept["factor"] if kept.get("rope_type") == args.rope_scaling else USUAL_FACTOR


def merge_predecessor_of(model: PreTrainedModel, args: ChatModelArguments, about: dict[str, Any]) -> PreTrainedModel:
    """Merges the adapter that --lora_model was trained on (--checkpoint_dir) into the base, if it isn't merged yet.

    Raises:
        ChatModelError: if that adapter is missing, or the base is quantized; gives the command that merges it.
    """
    earlier = (about.get("lineage") or [{}])[-1]
    first = earlier.get("merged_adapter")
    if first is None:
        return model
    merged = (read_manifest(args.base_model) or {}).get("adapter") if Path(args.base_model).is_dir() else None
    if merged is not None and Path(merged).resolve() == Path(first).resolve():
        return model
    way_out = (
        f"python merge_peft_adapter.py --base_model {earlier.get('base_model')} --lora_model {first} "
        "--output_dir MERGED; then give --base_model MERGED"
    )
    if not (Path(first) / "adapter_config.json").is_file():
        raise ChatModelError(
            f"--lora_model {args.lora_model}: was trained with {first} merged into its base, which no longer "
            f"exists. Merge it: {way_out}"
        )
    if args.load_in_4bit or args.load_in_8bit:
        raise ChatModelError(f"--lora_model {args.lora_model}: was trained with {first} merged into its base, and "
                           f"nothing can be merged into quantized weights. Merge it first: {way_out}")  # fmt: skip
    logger.info(f"base: with {first} merged into it, as --lora_model was trained")
    return merge_in_memory(model, first).requires_grad_(False)
