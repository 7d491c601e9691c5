"""LoRA adapters: which layers they take, attaching a new one, going on from a saved one, merging in memory."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stagewise.arguments import AdapterArguments, ArgumentError

# A module whose path has one of these words belongs to pictures or sound, which text batches never reach.
OTHER_SENSES = ("vision", "visual", "audio", "image", "multi_modal", "multimodal", "speech")


class AdapterError(ArgumentError):
    """An adapter that cannot be attached, loaded or merged; the message names the flag and what to do."""


# ---------------------------------------------------------------------------------------------------------- targets


def linear_targets(model: PreTrainedModel) -> list[str]:
    """Names for `target_modules` of every linear layer: nn.Linear, its 4/8-bit forms, Conv1D, fused projections.

    Left out: the output head, a reward model's head, and the layers of pictures and sound. A name is the last part
    of the module's path ("q_proj"), or its full path where the last part alone would also take a layer left out.

    Raises:
        AdapterError: if there is no linear layer.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    heads |= {name for name in linear if name.rsplit(".", 1)[-1] in SEQ_CLS_HEAD_NAMES}
    left_out = {n for n in linear if n in heads or any(w in part for w in OTHER_SENSES for part in n.split("."))}
    taken = linear - left_out
    if not taken:
        raise AdapterError(f"--target_modules all: {type(model).__name__} has no linear layers")
    ambiguous = {name.rsplit(".", 1)[-1] for name in left_out}
    lasts = {name: name.rsplit(".", 1)[-1] for name in taken}
    return sorted({name if last in ambiguous else last for name, last in lasts.items()})


def fused_experts(model: nn.Module) -> list[str]:
    """Last parts of the names of 3-D expert parameters, which are no linear layers ("experts.gate_up_proj")."""
    names = (name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name)
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def _names(value: str | list[str] | None) -> list[str]:
    """A flag's names: joined by commas, or already a list."""
    parts = value.split(",") if isinstance(value, str) else list(value or [])
    return [part.strip() for part in parts if part.strip()]


def _check_names(model: nn.Module, flag: str, wanted: list[str], kinds: tuple[type, ...] | None) -> None:
    """Raises AdapterError if a name matches no module of `kinds` (None: any that has weights of its own)."""
    exist = {
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, kinds) if kinds else any(True for _ in module.parameters()))
    }
    unknown = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in exist)]
    if not unknown:
        return
    lasts = sorted({last for name in exist if not (last := name.rsplit(".", 1)[-1]).isdigit()})
    experts = [name for name in fused_experts(model) if name.rsplit(".", 1)[-1] in unknown]
    hint = f" ({', '.join(experts)}: experts held as one 3-D parameter, no layer)" if experts else ""
    raise AdapterError(
        f"--{flag}: {type(model).__name__} has no {', '.join(unknown)}{hint}; there are {', '.join(lasts)}"
    )


# --------------------------------------------------------------------------------------------------- attach or go on


def attach_adapter(model: PreTrainedModel, args: AdapterArguments, task_type: str) -> PeftModel:
    """Wraps the model in a new LoRA adapter, or in the one of --peft_path to go on from.

    The adapter's weights are float32 whatever the base's precision. LoRA: https://arxiv.org/abs/2106.09685

    Args:
        model: the base; its own weights no longer get gradients.
        args: the adapter flags.
        task_type: "CAUSAL_LM", or "SEQ_CLS": the head `score` is then trained and saved in full.

    Raises:
        AdapterError: for names that the model does not have, or flags that contradict the adapter of --peft_path.
    """
    if args.peft_path:
        config = read_adapter_config(args.peft_path)
        check_continuation(args, config, task_type)
        wrapped = load_adapter(model, args.peft_path, is_trainable=True)
        logger.info(f"adapter: goes on from {args.peft_path}, {_summary(wrapped)}")
        return wrapped
    everything = _names(args.target_modules) in (["all"], ["all-linear"])
    targets = linear_targets(model) if everything else _names(args.target_modules)
    kept = _names(args.modules_to_save)
    if not everything:
        _check_names(model, "target_modules", targets, (nn.Linear, Conv1D, nn.Embedding))
    _check_names(model, "modules_to_save", kept, None)
    _check_pairs(model, targets, kept)
    kept, tied = keep_tie(model, kept)
    config = LoraConfig(
        task_type=task_type,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=kept or None,
        fan_in_fan_out=_all_conv1d(model, targets),
        ensure_weight_tying=tied,
    )
    wrapped = get_peft_model(model, config)
    left_out = fused_experts(model) if everything else []
    logger.info(
        f"adapter: LoRA on {', '.join(targets)}"
        + (f"; left out (3-D expert parameters): {', '.join(left_out)}" if left_out else "")
        + f"; {_summary(wrapped)}"
    )
    return wrapped


def _check_pairs(model: PreTrainedModel, targets: list[str], kept: list[str]) -> None:
    """Raises AdapterError for a module named twice, and for half of a tied pair."""
    if both := sorted(set(targets) & set(kept)):
        raise AdapterError(
            f"--target_modules and --modules_to_save both name {', '.join(both)}: keep it in one of them"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        pair = {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if module is head or module is embedding}
        if named := pair & {target.rsplit(".", 1)[-1] for target in targets}:
            raise AdapterError(f"--target_modules {named.pop()}: embedding and head are tied; use --modules_to_save")


def keep_tie(model: PreTrainedModel, kept: list[str]) -> tuple[list[str], bool]:
    """On a tied model, embedding and head are trained as one weight, whichever of them was named."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not kept or head.weight is not embedding.weight:
        return kept, False
    pair = {name: module for name, module in model.named_modules() if module is head or module is embedding}
    named = [k for k in kept if any(name == k or name.endswith(f".{k}") for name in pair)]
    if not named:
        return kept, False
    # PEFT looks for the tie only where one of its own names (lm_head) is listed, so both always are.
    lasts = [name.rsplit(".", 1)[-1] for name in pair]
    return [*(k for k in kept if k not in named), *lasts], True


def _all_conv1d(model: nn.Module, targets: list[str]) -> bool:
    """Conv1D keeps its weight as (in, out); PEFT wants that said."""
    kinds = [type(m) for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)]
    return bool(kinds) and all(issubclass(kind, Conv1D) for kind in kinds)


def _summary(model: PeftModel) -> str:
    config = model.peft_config["default"]
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, grad in counts if grad), sum(n for n, _ in counts)
    lasts = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}  # PEFT lists heads that do not exist, too
    in_full = sorted({n.rsplit(".", 1)[-1] for n in config.modules_to_save or []} & lasts)
    return (
        f"rank {config.r}, alpha {config.lora_alpha:g}{', in full ' + ', '.join(in_full) if in_full else ''}; "
        f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)"
    )


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """Reads adapter_config.json of a local directory.

    Raises:
        AdapterError: if there is none, or its weights are missing.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder}: expected an adapter, found no adapter_config.json")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterError(f"{folder}: the adapter has no adapter_model.safetensors (or .bin)")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise AdapterError(f"{folder}/adapter_config.json: {error}") from error


def check_continuation(args: AdapterArguments, config: PeftConfig, task_type: str) -> None:
    """Raises AdapterError for flags that ask for something else than the adapter of --peft_path is.

    Only a flag that differs from its own default can be seen to have been given.
    """
    kind = config.peft_type.value
    if kind != "LORA":
        raise AdapterError(
            f"--peft_path {args.peft_path}: a {kind} adapter; this version goes on from LoRA adapters only"
        )
    if config.task_type is not None and str(getattr(config.task_type, "value", config.task_type)) != task_type:
        raise AdapterError(
            f"--peft_path {args.peft_path}: its task is {config.task_type}, this stage trains {task_type}"
        )
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(AdapterArguments)}
    pairs = [("lora_rank", config.r), ("lora_alpha", config.lora_alpha), ("lora_dropout", config.lora_dropout)]
    for name, own in pairs:
        if getattr(args, name) not in (defaults[name], own):
            raise AdapterError(
                f"--{name} {getattr(args, name)}: the adapter of --peft_path has {own}; leave the flag out"
            )
    for name in ("target_modules", "modules_to_save"):
        asked, own = getattr(args, name), _names(getattr(config, name))
        # a reward head is kept without being named, and a tied head goes with the embedding
        implied = set(SEQ_CLS_HEAD_NAMES)
        if config.ensure_weight_tying:  # PEFT adds the embedding's full path
            implied |= {"lm_head", *(n.rsplit(".", 1)[-1] for n in own if "." in n)}
        differ = {n.rsplit(".", 1)[-1] for n in _names(asked)} ^ {n.rsplit(".", 1)[-1] for n in own}
        if asked != defaults[name] and differ - implied:
            shown = ", ".join(sorted(own)) or "none"
            raise AdapterError(f"--{name} {asked}: the adapter of --peft_path has {shown}; leave the flag out")


def load_adapter(base: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on its base; `adapter_model.bin` is read with weights_only=True, so it can run no code.

    Raises:
        AdapterError: if it does not fit the base: other shapes, or weights that match no module.
    """
    config = read_adapter_config(folder)
    names = _tensor_names(Path(folder))
    if getattr(config, "ensure_weight_tying", False):
        # PEFT saves the embedding's name alone and finds the tie again only where the head is listed too.
        config.modules_to_save, _ = keep_tie(base, _names(config.modules_to_save))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=is_trainable)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise AdapterError(f"{folder}: the adapter does not fit {type(base).__name__}: {error}") from error
    # PEFT drops weights for which it finds no module without a word.
    modules = {name for name, _ in wrapped.named_modules()}
    lost = [n for n in names if n.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias") not in modules]
    if lost and config.peft_type.value == "LORA" and not config.target_parameters:
        raise AdapterError(
            f"{folder}: {type(base).__name__} has no module for {', '.join(lost[:3])} ({len(lost)} weights)"
        )
    return wrapped if is_trainable else wrapped.eval()


def _tensor_names(folder: Path) -> list[str]:
    """The names of an adapter's weights; a .bin that holds more than tensors is refused."""
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as weights:
            return list(weights.keys())
    path = folder / "adapter_model.bin"
    try:
        return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(f"{path}: refused, not a plain file of tensors: {error}") from error


def merge_in_memory(model: PreTrainedModel, adapter_dir: str | Path) -> PreTrainedModel:
    """Merges an adapter into the loaded base (--checkpoint_dir) and returns the plain model, all of it trainable.

    Raises:
        AdapterError: for adapters that cannot be merged, and for a 4- or 8-bit base.
    """
    refuse_unmergeable(read_adapter_config(adapter_dir), adapter_dir)
    if getattr(model, "is_quantized", False):
        raise AdapterError(f"{adapter_dir}: merging onto a 4- or 8-bit base loses the model; load the base in 16 bit")
    was_training = model.training
    merged = fold(load_adapter(model, adapter_dir)).requires_grad_(True)
    logger.info(f"merged in memory: {adapter_dir}")
    return merged.train(was_training)


def refuse_unmergeable(config: PeftConfig, folder: str | Path) -> None:
    """Raises AdapterError for prompt, P- and prefix tuning, which add virtual tokens and change no weight."""
    if config.is_prompt_learning:
        raise AdapterError(
            f"{folder}: a {config.peft_type.value} adapter adds virtual tokens and cannot be merged; load it with "
            "PEFT beside its base: PeftModel.from_pretrained(base, adapter)"
        )


def fold(wrapped: PeftModel) -> PreTrainedModel:
    """Adds every adapter layer's weight to its base's, in float32, one layer at a time; returns the plain model."""
    _untie_adapted(wrapped.get_base_model())
    for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None:  # an adapter on a bare parameter: PEFT adds in the base's precision
            layer.merge(safe_merge=True)
            continue
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight = layer.get_base_layer().weight
        weight.data = weight.data.to(dtype)
    model = wrapped.unload()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return model


def _untie_adapted(model: PreTrainedModel) -> None:
    """Gives a tied head its own weight where embedding or head is adapted: the change is not the other's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = any(isinstance(module, LoraLayer) for module in (head, embedding))
    if head is not None and adapted and head.weight is embedding.weight:
        target = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        target.weight = nn.Parameter(target.weight.detach().clone())
