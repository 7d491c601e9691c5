"""Checks of flags that are impossible, have no effect or do not fit together, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagewise.config.arguments import (
    METHODS,
    AdapterArguments,
    DataArguments,
    LanguageModelArguments,
    ModelArguments,
    PairArguments,
)
from stagewise.config.flags import NO, YES
from stagewise.errors import ArgumentError

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "longrope")


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises an ArgumentError that names the flag unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(f"--{flag}: expected one of {', '.join(choices)}, found {value!r}")


def named_checkpoint(value: str | bool | None) -> Path | None:
    """The folder that --resume_from_checkpoint names; None if its value is True, False or absent.

    Raises:
        ArgumentError: the folder does not exist.
    """
    text = str(value).lower()
    if text in YES or text in NO or text in ("none", ""):
        return None
    if not Path(str(value)).is_dir():
        raise ArgumentError(f"--resume_from_checkpoint {value}: no such folder")
    return Path(str(value))


def check_shared(*arguments: Any) -> None:
    """Checks that involve several flags of the shared dataclasses, before anything is loaded.

    Raises:
        ArgumentError: naming the flags that do not fit together and what to do.
    """
    for part in arguments:
        if isinstance(part, ModelArguments):
            check_choice("torch_dtype", part.torch_dtype, ("auto", "float32", "bfloat16", "float16"))
            part.rope_length = longest_row(arguments)
            _check_context(part)
            _check_router(part)
        elif isinstance(part, DataArguments):
            _check_data(part)
        elif isinstance(part, PairArguments):
            for name in ("max_source_length", "max_target_length"):
                if getattr(part, name) < 1:
                    raise ArgumentError(f"--{name}: expected at least 1, found {getattr(part, name)}")
        elif isinstance(part, AdapterArguments):
            _check_adapter(part)
        elif isinstance(part, LanguageModelArguments) and not 0 <= (part.neft_alpha or 0) < float("inf"):
            raise ArgumentError(f"--neft_alpha: expected 0 (no noise) or more, found {part.neft_alpha}")
    longest = longest_row(arguments)
    if longest is not None and longest[1] < 1:
        raise ArgumentError(f"{longest[0]}: expected at least 1, found {longest[1]}")


def longest_row(parts: Sequence[Any]) -> tuple[str, int] | None:
    """The flag that sets the length of a stage's rows, and its tokens; None if no flag does."""
    for part in parts:
        for name in ("model_max_length", "block_size"):
            if hasattr(part, name):
                return f"--{name}", getattr(part, name)
        if isinstance(part, PairArguments):
            return "--max_source_length + --max_target_length", part.max_source_length + part.max_target_length
    return None


def _check_context(model: ModelArguments) -> None:
    if model.rope_scaling is not None:
        check_choice("rope_scaling", model.rope_scaling, ROPE_SCALINGS)
    for name in ("rope_factor", "rope_factors_file"):
        if getattr(model, name) is not None and model.rope_scaling is None:
            raise ArgumentError(f"--{name} needs --rope_scaling, one of {', '.join(ROPE_SCALINGS)}")
    if model.rope_factor is not None and not 1 < model.rope_factor < float("inf"):
        raise ArgumentError(f"--rope_factor: expected a number above 1, found {model.rope_factor}")
    if model.rope_factors_file is not None and model.rope_scaling != "longrope":
        raise ArgumentError(f"--rope_factors_file has no effect on {model.rope_scaling}: it belongs to longrope")
    if model.rope_factors_file is not None and not Path(model.rope_factors_file).is_file():
        raise ArgumentError(f"--rope_factors_file {model.rope_factors_file}: no such file")
    if not 0 < model.shift_group_ratio <= 0.5:
        raise ArgumentError(f"--shift_group_ratio: expected above 0, at most 0.5, found {model.shift_group_ratio}")
    if not model.shift_attn and model.shift_group_ratio != ModelArguments.shift_group_ratio:
        raise ArgumentError("--shift_group_ratio has no effect without --shift_attn: add it, or leave it out")


def _check_router(model: ModelArguments) -> None:
    weight = model.router_aux_loss_coef
    if weight is not None and not model.router_aux_loss:
        raise ArgumentError("--router_aux_loss_coef has no effect without --router_aux_loss: add it, or leave it out")
    if weight is not None and not 0 < weight < float("inf"):
        raise ArgumentError(f"--router_aux_loss_coef: expected a number above 0, found {weight}")


def _check_data(data: DataArguments) -> None:
    check_choice("on_bad_record", data.on_bad_record, ("error", "skip"))
    if data.train_file_dir and data.dataset_name:
        raise ArgumentError("--train_file_dir and --dataset_name are both given: give one source of training records")
    if data.dataset_config_name and not data.dataset_name:
        raise ArgumentError("--dataset_config_name needs --dataset_name")
    percentage = data.validation_split_percentage
    if percentage is not None and not 0 < percentage < 100:
        raise ArgumentError(f"--validation_split_percentage: expected 1 to 99, found {percentage}")
    if percentage is not None and data.validation_file_dir:
        raise ArgumentError("--validation_split_percentage has no effect with --validation_file_dir: give one of them")
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(data, name)
        if value != -1 and value < 1:
            raise ArgumentError(f"--{name}: expected -1 (all) or at least 1, found {value}")
    if data.preprocessing_num_workers is not None and data.preprocessing_num_workers < 1:
        raise ArgumentError(
            f"--preprocessing_num_workers: expected at least 1, found {data.preprocessing_num_workers}"
        )


def _check_adapter(adapter: AdapterArguments) -> None:
    check_choice("fine_tuning_type", adapter.fine_tuning_type, tuple(METHODS))
    named, trained = adapter.fine_tuning_type, adapter.use_peft
    if not trained and named != "full" and adapter.asks("fine_tuning_type"):
        raise ArgumentError(f"--use_peft False trains all weights, --fine_tuning_type {named} an adapter: give one")
    if named == "full" and trained and "use_peft" in adapter.given:
        raise ArgumentError("--use_peft True trains an adapter, --fine_tuning_type full all weights: give one of them")
    if adapter.peft_path and not adapter.trains_adapter:
        raise ArgumentError("--peft_path has no effect when all weights are trained: leave it out, or --use_peft True")
    for name in ("lora_rank", "init_r", "target_r", "deltaT", "num_virtual_tokens", "encoder_hidden_size"):
        if (value := getattr(adapter, name)) is not None and value < 1:
            raise ArgumentError(f"--{name}: expected at least 1, found {value}")
    for name in ("tinit", "tfinal", "orth_reg_weight"):
        if getattr(adapter, name) < 0:
            raise ArgumentError(f"--{name}: expected 0 or more, found {getattr(adapter, name)}")
    for name in ("beta1", "beta2"):
        if not 0 < getattr(adapter, name) < 1:
            raise ArgumentError(f"--{name}: expected between 0 and 1, found {getattr(adapter, name)}")
    if not 0 <= adapter.lora_dropout < 1:
        raise ArgumentError(f"--lora_dropout: expected 0 to below 1, found {adapter.lora_dropout}")
    if adapter.loraplus_lr_ratio is not None and adapter.loraplus_lr_ratio < 1:
        raise ArgumentError(f"--loraplus_lr_ratio: expected at least 1, found {adapter.loraplus_lr_ratio}")
    # PEFT's faster variants of PiSSA draw random numbers, and loading such an adapter would draw them again.
    check_choice("init_lora_weights", adapter.init_lora_weights, ("default", "gaussian", "pissa"))
    if not adapter.peft_path:  # otherwise the adapter determines the method
        check_flags_of_method(adapter)


def check_flags_of_method(adapter: AdapterArguments) -> None:
    """Raises ArgumentError for flags that belong to another method than the one in use."""
    method = adapter.method
    for name in sorted({name for names in METHODS.values() for name in names} - set(METHODS[method])):
        # No dropout, no projection … holds for every method.
        if not adapter.asks(name) or getattr(adapter, name) in (None, False, 0):
            continue
        if method == "full":
            raise ArgumentError(
                f"--{name} belongs to an adapter and has no effect when all weights are trained: leave it out, or "
                "--use_peft True"
            )
        hint = (
            "--init_r and --target_r are its ranks" if (method, name) == ("adalora", "lora_rank") else "leave it out"
        )
        known = ", ".join(f"--fine_tuning_type {m}" for m, names in METHODS.items() if name in names)
        raise ArgumentError(f"--{name} has no effect on {method}: {hint}, or train with {known}")
    if method == "prefix_tuning" and adapter.encoder_hidden_size and not adapter.prefix_projection:
        raise ArgumentError("--encoder_hidden_size has no effect without --prefix_projection: add it, or leave it out")
    if method == "adalora" and adapter.init_r <= adapter.target_r:
        raise ArgumentError(
            f"--init_r {adapter.init_r} must be above --target_r {adapter.target_r}: AdaLoRA's ranks fall from one to "
            "the other; for a fixed rank take --fine_tuning_type lora"
        )
