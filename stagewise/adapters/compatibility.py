"""Which training method works with which stage, and what is refused before any weights are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from peft import PeftConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from stagewise.adapters.files import method_of, read_adapter_config, task_of
from stagewise.adapters.targets import names_of
from stagewise.config.arguments import METHODS, VIRTUAL_TOKENS, AdapterArguments, ModelArguments
from stagewise.config.checks import check_flags_of_method
from stagewise.config.stages import STAGES
from stagewise.errors import AdapterError, ArgumentError


def check_methods(stage: str, args: TrainingArguments, parts: Sequence[Any]) -> None:
    """Checks the flags of method, quantization and stage together; --peft_path sets --fine_tuning_type.

    Args:
        stage: "pt", "sft", "rm", "dpo" or "ppo".
        args: the Trainer's arguments.
        parts: the stage's dataclasses.

    Raises:
        ArgumentError: for combinations that cannot work, with a way out.
    """
    adapter = next((part for part in parts if isinstance(part, AdapterArguments)), None)
    model = next((part for part in parts if isinstance(part, ModelArguments)), None)
    if adapter is None or model is None:
        return
    if adapter.peft_path:
        set_method_from_adapter(adapter, STAGES[stage].task)
    if adapter.method in VIRTUAL_TOKENS:
        _check_virtual_tokens(stage, args, adapter)
    elif adapter.method == "adalora":
        check_schedule(adapter, args.max_steps)
        if args.deepspeed:
            raise ArgumentError(
                "--fine_tuning_type adalora: DeepSpeed clears the gradients that ranks are chosen by before the step "
                "ends; start it by torchrun without --deepspeed, or take --fine_tuning_type lora"
            )
    elif adapter.method == "lora":
        _check_lora(stage, adapter, model)
    if model.bits:
        _check_quantized(args, adapter, model, next((p for p in parts if hasattr(p, "checkpoint_dir")), None))
    if model.router_aux_loss and stage == "rm":
        raise ArgumentError("--router_aux_loss: a reward model gives no routers' loss; leave it out")
    if not model.quantize_experts and model.bits != 4:
        raise ArgumentError("--quantize_experts False has no effect without --qlora or --load_in_4bit: leave it out")
    if args.optim.startswith("paged_") and args.device.type == "cpu":
        raise ArgumentError(f"--optim {args.optim.value}: paged optimizers need a GPU; leave it out on a CPU")


def set_method_from_adapter(adapter: AdapterArguments, task_type: str) -> None:
    """Sets the method to that of the adapter of --peft_path.

    Raises:
        ArgumentError: for another --fine_tuning_type, or flags that contradict the adapter.
    """
    config = read_adapter_config(adapter.peft_path)
    method = method_of(config, adapter.peft_path)
    if adapter.asks("fine_tuning_type") and adapter.fine_tuning_type != method:
        raise ArgumentError(
            f"--fine_tuning_type {adapter.fine_tuning_type}: the adapter of --peft_path is of {method}; leave the "
            "flag out"
        )
    adapter.fine_tuning_type = method
    check_flags_of_method(adapter)
    check_continuation(adapter, config, task_type)


def _check_virtual_tokens(stage: str, args: TrainingArguments, adapter: AdapterArguments) -> None:
    flag = f"--fine_tuning_type {adapter.method}"
    if not STAGES[stage].virtual_tokens:
        raise ArgumentError(
            f"{flag}: not for this stage, which reads single positions that virtual tokens move; train with "
            "--fine_tuning_type lora"
        )
    if is_deepspeed_zero3_enabled():
        raise ArgumentError(f"{flag}: ZeRO-3 takes the embedding apart that virtual tokens join; use zero2.json")
    if adapter.method == "prefix_tuning" and args.gradient_checkpointing:
        raise ArgumentError(
            f"{flag}: --gradient_checkpointing drops the keys and values that the prefix is made of; leave it out, or "
            "take --fine_tuning_type p_tuning"
        )


def check_schedule(adapter: AdapterArguments, steps: int) -> None:
    """Raises ArgumentError if a run of `steps` optimizer steps is too short for AdaLoRA; -1: not known yet."""
    if adapter.peft_path:  # its ranks have been chosen
        return
    if 0 < steps <= adapter.tinit + adapter.tfinal:
        raise ArgumentError(
            f"--fine_tuning_type adalora: ranks fall between --tinit {adapter.tinit} and --tfinal {adapter.tfinal} "
            f"steps from the end, and the run has {steps} steps; lower them, or train longer"
        )


def _check_lora(stage: str, adapter: AdapterArguments, model: ModelArguments) -> None:
    start, flag = adapter.init_lora_weights, "--init_lora_weights"
    if adapter.peft_path:  # PEFT repeats an adapter's initialization when it loads it
        start, flag = str(read_adapter_config(adapter.peft_path).init_lora_weights), f"--peft_path {adapter.peft_path}"
    if not start.startswith("pissa"):
        return
    flag = f"{flag}: {start}" if adapter.peft_path else f"{flag} {start}"
    if STAGES[stage].reference:
        raise ArgumentError(
            f"{flag}: takes directions out of the base, which without its adapter would then be another reference; "
            "leave it out here"
        )
    if model.bits:
        raise ArgumentError(f"{flag}: decomposes the base's weights, which are quantized; leave one of the two out")
    if is_deepspeed_zero3_enabled():
        raise ArgumentError(f"{flag}: decomposes whole weights, which ZeRO-3 does not hold; use zero2.json")


def _check_quantized(
    args: TrainingArguments, adapter: AdapterArguments, model: ModelArguments, predecessor: Any
) -> None:
    flag = "--qlora" if model.qlora else f"--load_in_{model.bits}bit"
    if model.load_in_8bit and model.bits == 4:
        raise ArgumentError(f"{flag} and --load_in_8bit are both given: a base has 4 bit or 8 bit; give one of them")
    if adapter.method == "full":
        raise ArgumentError(f"{flag}: quantized weights cannot be trained; train an adapter, or leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ArgumentError(f"{flag}: bitsandbytes is missing: pip install bitsandbytes")
    if is_deepspeed_zero3_enabled():
        raise ArgumentError(f"{flag}: ZeRO-3 cannot partition quantized weights; use zero2.json, or leave it out")
    if getattr(predecessor, "checkpoint_dir", None):
        raise ArgumentError(
            f"{flag}: --checkpoint_dir cannot be merged into quantized weights; merge it first: python "
            f"merge_peft_adapter.py --lora_model {predecessor.checkpoint_dir} --output_dir MERGED"
        )
    if args.device.type not in ("cuda", "cpu", "xpu"):
        raise ArgumentError(f"{flag}: bitsandbytes does not run on {args.device.type}; load in 16 bit")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 5):
        raise ArgumentError(f"{flag}: needs a GPU of compute capability 7.5 or later; load in 16 bit")
    if adapter.method == "prefix_tuning":
        logger.info(f"{flag}: the prefix is cast to the precision of the other keys and values")


def check_continuation(
    args: AdapterArguments, config: PeftConfig, task_type: str, everything: Sequence[str] = ()
) -> None:
    """Raises AdapterError for flags that contradict the adapter of --peft_path.

    A flag counts if it was given on the command line, even with its default value, or differs from its default.

    Args:
        args: the adapter flags.
        config: the adapter's.
        task_type: what the stage trains.
        everything: the meaning of --target_modules all, once the model is loaded.
    """
    method = method_of(config, args.peft_path)
    if config.task_type is not None and task_of(config) != task_type:
        raise AdapterError(
            f"--peft_path {args.peft_path}: its task is {config.task_type}, this stage trains {task_type}"
        )
    renamed = {"lora_rank": "r"}
    named = ("target_modules", "modules_to_save", "init_lora_weights", "loraplus_lr_ratio")
    for name in (name for name in METHODS[method] if name not in named):
        own = getattr(config, renamed.get(name, name))
        if args.asks(name) and getattr(args, name) != own:
            raise AdapterError(
                f"--{name} {getattr(args, name)}: the adapter of --peft_path has {own}; leave the flag out"
            )
    if "init_lora_weights" in METHODS[method] and args.asks("init_lora_weights"):
        raise AdapterError(
            "--init_lora_weights has no effect: the adapter of --peft_path is already initialized; leave it out"
        )
    for name in ("target_modules", "modules_to_save") if "target_modules" in METHODS[method] else ():
        asked, own = getattr(args, name), names_of(getattr(config, name))
        wanted, experts = names_of(asked), names_of(getattr(config, "target_parameters", None))
        own += experts if name == "target_modules" else []
        if name == "target_modules" and wanted in (["all"], ["all-linear"]):
            if not everything:
                continue
            wanted = [n for n in everything if "expert" not in n or n in experts]  # they may have been left out
        # a reward head is kept without being named, and a tied head is saved with the embedding
        implied = set(SEQ_CLS_HEAD_NAMES)
        if config.ensure_weight_tying:  # PEFT adds the embedding's full path
            implied |= {"lm_head", *(n.rsplit(".", 1)[-1] for n in own if "." in n)}
        differ = {n.rsplit(".", 1)[-1] for n in wanted} ^ {n.rsplit(".", 1)[-1] for n in own}
        if args.asks(name) and differ - implied:
            shown = ", ".join(sorted(own)) or "none"
            raise AdapterError(f"--{name} {asked}: the adapter of --peft_path has {shown}; leave the flag out")
