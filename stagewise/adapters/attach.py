"""Adapters: attaching a new one, continuing from a saved one, loading, and merging in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from loguru import logger
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from stagewise.adapters.adalora import AdaptiveRanks, attach_ranks, load_with_all_ranks, schedule_config
from stagewise.adapters.compatibility import check_continuation
from stagewise.adapters.files import read_adapter_config, refuse_unmergeable, tensor_names
from stagewise.adapters.targets import (
    all_conv1d,
    check_names,
    check_pairs,
    choose_targets,
    fused_experts,
    keep_tie,
    linear_targets,
    names_of,
)
from stagewise.adapters.virtual_tokens import EncoderState, attach_virtual_tokens, train_directly
from stagewise.artifacts.manifest import parameters_of
from stagewise.config.arguments import VIRTUAL_TOKENS, AdapterArguments
from stagewise.errors import AdapterError
from stagewise.models.attention.shifted import is_shifted, longlora_modules
from stagewise.models.quantization.experts import reach_packed

# ------------------------------------------------------------------------------------------------- attach or continue


def attach_adapter(model: PreTrainedModel, args: AdapterArguments, task_type: str) -> PeftModel:
    """Wraps the model in a new adapter, or in the one of --peft_path to continue from.

    The adapter's weights are float32, whatever the base's precision. LoRA: https://arxiv.org/abs/2106.09685, rsLoRA:
    2312.03732, DoRA: 2402.09353, PiSSA: 2404.02948, AdaLoRA: 2303.10512.

    Args:
        model: the base; its own weights no longer get gradients.
        args: the adapter flags.
        task_type: "CAUSAL_LM", or "SEQ_CLS": the head `score` is then trained and saved in full.

    Raises:
        AdapterError: for names that the model does not have, or flags that contradict the adapter of --peft_path.
    """
    if args.peft_path:
        return _go_on(model, args, task_type)
    if args.method in VIRTUAL_TOKENS:
        wrapped = attach_virtual_tokens(model, args, task_type)
        logger.info(f"adapter: {args.method} before the text; {_summary(wrapped)}")
        return wrapped
    kept = names_of(args.modules_to_save)
    targets = choose_targets(model, args)
    check_names(model, "modules_to_save", kept, None)
    if args.longlora_plus and is_shifted(model):
        kept += [name for name in longlora_modules(model) if name not in kept]
    check_pairs(model, targets.modules, kept)
    kept, tied = keep_tie(model, kept)
    common = {
        "task_type": task_type,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": 0.0 if targets.parameters else args.lora_dropout,
        "target_modules": targets.modules,
        "modules_to_save": kept or None,
        "fan_in_fan_out": all_conv1d(model, targets.modules),
        "ensure_weight_tying": tied,
    }
    if args.method == "adalora":
        wrapped, name = attach_ranks(model, schedule_config(args, **common)), "AdaLoRA"
    else:
        start = {"default": True}.get(args.init_lora_weights, args.init_lora_weights)
        experts = {"target_parameters": targets.parameters} if targets.parameters else {}
        variant = {"use_rslora": args.use_rslora, "use_dora": args.use_dora, "init_lora_weights": start, **experts}
        config, name = LoraConfig(r=args.lora_rank, **common, **variant), _lora_name(args)
        reach_packed(config)
        wrapped = get_peft_model(model, config)
        if targets.parameters and args.lora_dropout:
            logger.info("adapter: no dropout, since the experts held as one 3-D parameter take none")
    logger.info(f"adapter: {name} on {targets}; {_summary(wrapped)}")
    return wrapped


def _lora_name(args: AdapterArguments) -> str:
    words = {"rsLoRA": args.use_rslora, "DoRA": args.use_dora, "PiSSA": args.init_lora_weights.startswith("pissa")}
    used = [word for word, asked in words.items() if asked]
    return " with ".join(["LoRA", ", ".join(used)]) if used else "LoRA"


def _go_on(model: PreTrainedModel, args: AdapterArguments, task_type: str) -> PeftModel:
    """Loads the adapter of --peft_path, with its own rank and targets, for further training."""
    config = read_adapter_config(args.peft_path)
    check_continuation(args, config, task_type, [*linear_targets(model), *fused_experts(model)])
    plus = longlora_modules(model)
    if config.is_prompt_learning:
        wrapped = train_directly(load_adapter(model, args.peft_path))
    else:
        wrapped = load_adapter(model, args.peft_path, is_trainable=True)
    logger.info(f"adapter: continues from {args.peft_path}, {_summary(wrapped)}")
    if args.longlora_plus and is_shifted(model):
        has = {name.rsplit(".", 1)[-1] for name in names_of(getattr(config, "modules_to_save", None))}
        if lacking := [name for name in plus if name not in has]:
            logger.info(f"adapter: {', '.join(lacking)} stay frozen, which the adapter of --peft_path has not trained")
    return wrapped


def _summary(model: PeftModel) -> str:
    config = model.peft_config["default"]
    counts = parameters_of(model)
    trained, total = counts["trained"], counts["all"]
    share = f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)"
    if config.is_prompt_learning:
        return f"{config.num_virtual_tokens} virtual tokens; {share}"
    lasts = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}  # PEFT also lists heads that do not exist
    in_full = sorted({n.rsplit(".", 1)[-1] for n in config.modules_to_save or []} & lasts)
    rank = f"ranks {config.init_r} to {config.target_r}" if hasattr(config, "init_r") else f"rank {config.r}"
    return f"{rank}, alpha {config.lora_alpha:g}{', in full ' + ', '.join(in_full) if in_full else ''}; {share}"


def load_adapter(base: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Attaches a saved adapter to its base; `adapter_model.bin` is read with weights_only=True, so it can run no code.

    Raises:
        AdapterError: if it does not fit the base: other shapes, or weights without a module.
    """
    config = read_adapter_config(folder)
    names = tensor_names(Path(folder))
    if getattr(config, "ensure_weight_tying", False):
        # PEFT saves only the embedding's name and restores the tie only if the head is listed, too.
        config.modules_to_save, _ = keep_tie(base, names_of(config.modules_to_save))
    kind = config.peft_type.value
    if kind == "LORA":
        reach_packed(config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # AdaLoRA's pattern lists ranks within a matrix; this check is for LoRA's, which lists matrices
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
            if kind == "ADALORA" and is_trainable:
                wrapped = load_with_all_ranks(base, folder, config)
            else:
                wrapped = PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=is_trainable)
    except (RuntimeError, ValueError, TypeError, UserWarning) as error:
        raise AdapterError(f"{folder}: the adapter does not fit {type(base).__name__}: {error}") from error
    # PEFT silently drops weights for which it finds no module.
    modules = {name for name, _ in wrapped.named_modules()}
    lost = [n for n in names if n.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias") not in modules]
    if lost and kind in ("LORA", "ADALORA") and not config.target_parameters:
        raise AdapterError(
            f"{folder}: {type(base).__name__} has no module for {', '.join(lost[:3])} ({len(lost)} weights)"
        )
    return wrapped if is_trainable else wrapped.eval()


# ------------------------------------------------------------------------------------------------- while it is trained


def method_callbacks(trainer: Trainer, adapter: AdapterArguments | None) -> list[TrainerCallback]:
    """The callbacks of a method: AdaLoRA's schedule, the encoder of virtual tokens; also sets up LoRA+."""
    if adapter is None or not adapter.trains_adapter:
        return []
    wrapped = trainer.model
    if adapter.loraplus_lr_ratio:
        use_loraplus(trainer, adapter.loraplus_lr_ratio)
    if adapter.method == "adalora":
        return [AdaptiveRanks(trainer, wrapped, adapter)]
    return [EncoderState(wrapped)] if adapter.method in VIRTUAL_TOKENS else []


def use_loraplus(trainer: Trainer, ratio: float) -> None:
    """LoRA+: the matrices B get `ratio` times the learning rate of all others (https://arxiv.org/abs/2402.12354)."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    rate, decayed = options.pop("lr"), set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            fast = ".lora_B." in name or ".lora_embedding_B." in name
            groups.setdefault((fast, name in decayed), []).append(parameter)
    trainer.optimizer = kind(
        [
            {"params": params, "lr": rate * (ratio if fast else 1), "weight_decay": trainer.args.weight_decay * decays}
            for (fast, decays), params in sorted(groups.items())
        ],
        lr=rate,
        **options,
    )


# ------------------------------------------------------------------------------------------------------------ merging


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


def lora_delta(layer: LoraLayer) -> torch.Tensor:
    """What a layer's active LoRA adapters add to its weight, scale · BA each: float32, of the weight's shape."""
    return sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)


def add_delta(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """weight + delta, added in float32 and rounded once, to the weight's precision."""
    return (weight.float() + delta).to(weight.dtype)


def fold(wrapped: PeftModel) -> PreTrainedModel:
    """Adds every adapter layer's weight to its base's, in float32, one layer at a time; returns the plain model."""
    _untie_adapted(wrapped.get_base_model())
    for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
        name = getattr(layer, "parameter_name", "weight")  # of an expert stack, or of a linear layer
        weight = getattr(layer.get_base_layer(), name)
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight = getattr(layer.get_base_layer(), name)
        weight.data = weight.data.to(dtype)
    model = wrapped.unload()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return model


def _untie_adapted(model: PreTrainedModel) -> None:
    """Gives a tied head its own weight if embedding or head is adapted: the change is not shared."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = any(isinstance(module, LoraLayer) for module in (head, embedding))
    if head is not None and adapted and head.weight is embedding.weight:
        target = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        target.weight = nn.Parameter(target.weight.detach().clone())
