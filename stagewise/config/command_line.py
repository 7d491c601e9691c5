"""The strict command-line parser of every script.

A command line may start with a `.yaml` or `.json` file of flags; flags after it override the file. Names used by
earlier pipelines are accepted, with one line that gives today's name. An unknown flag ends the program with the
nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.config.arguments import ChatArguments, LanguageModelArguments
from stagewise.config.flag_files import read_flags
from stagewise.config.flags import Flag, flags_of
from stagewise.config.help_text import help_text
from stagewise.config.paths import expanded
from stagewise.errors import ArgumentError

FALSE_WORDS = {"false", "no", "0", "none", "off"}
Given = list[tuple[str, list[str]]]  # flags by today's names, each with its words; the last one of a name counts

# Flags of later versions: refused by name if their value asks for them.
NOT_YET = {
    "cpm_quantization_target": "train with --qlora; tools.quantize_model writes the CPM form of a finished model",
}

# Names of earlier pipelines -> today's name; the value is taken over unchanged.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "use_auth_token": "hf_hub_token",
    "token": "hf_hub_token",
    "dtype": "torch_dtype",
    "reward_model_checkpoint": "reward_model_name_or_path",
    "quantized_or_merged_output_dir": "output_dir",
    "max_length": "model_max_length",
    "quantization": "load_in_4bit",  # these two are handled by `_quantization`, which reads the value
    "quantization_bit": "load_in_4bit",
    "adalora_init_r": "init_r",
    "adalora_tinit": "tinit",
    "adalora_tfinal": "tfinal",
    "adalora_delta_t": "deltaT",
    "adalora_target_r": "target_r",
    "neftune_noise_alpha": "neft_alpha",
    "disable_tqdm": "quiet",
    "output_router_logits": "router_aux_loss",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "predictions_file": "output_file",
    "train_dir": "train_file_dir",
    "validation_dir": "validation_file_dir",
}

# Names that transformers removed because the behavior is now always on.
ALWAYS_SO = {
    "use_fast_tokenizer": "transformers 5 has one kind of tokenizer, the fast one",
    "save_safetensors": "weights are always saved as safetensors",
    "half_precision_backend": "torch's own autocast is used",
    "fp16_opt_level": "torch's own autocast is used",
    "include_tokens_per_second": "tokens per second are always logged",
    "low_cpu_mem_usage": "weights are always loaded without a second copy",
}
RENAMED_OPTIMIZERS = {"adamw_hf": "adamw_torch"}


def parse(
    kinds: list[type],
    argv: list[str] | None = None,
    before: Callable[[Given], Given] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parses a command line strictly. --help prints all flags and ends the program.

    Args:
        kinds: dataclasses; every field is a flag.
        argv: words after the script's name; default `sys.argv[1:]`.
        before: gets the flags with their words before any dataclass is made; returns those to use.
        description: text that --help shows above the flags.

    Returns:
        one instance for each dataclass, in order.

    Raises:
        ArgumentError: for an unknown flag (with the nearest known name), a flag of a later version, a value that the
            flag does not take, a flag that is missing, or a bad file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = flags_of(kinds)
    if asked := [words for name, words in _split(argv) if name == "help"]:
        _print(help_text(flags, description, everything="all" in asked[0]))
        raise SystemExit(0)
    given = given_on(argv, flags)
    if before:
        given = before(given)
    values = {}
    for name, words in given:
        opposite = name not in flags
        value = flags[name.removeprefix("no_") if opposite else name].value(words)
        values[name.removeprefix("no_") if opposite else name] = (not value) if opposite else value
    if missing := [f"--{flag.name}" for flag in flags.values() if flag.required and flag.name not in values]:
        raise ArgumentError(f"{', '.join(missing)}: missing. --help lists all flags")
    names = [{field.name for field in dataclasses.fields(kind) if field.init} for kind in kinds]
    return tuple(
        kind(**{name: value for name, value in values.items() if name in own})
        for kind, own in zip(kinds, names, strict=True)
    )


def _print(text: str) -> None:
    """Prints, and tolerates a closed pipe, as after `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at exit


def given_on(argv: list[str], flags: Mapping[str, Flag]) -> Given:
    """The flags of a command line, preceded by those of the file that it may start with.

    Raises:
        ArgumentError: for an unknown flag or a bad file.
    """
    known = known_names(flags)
    given: Given = []
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        # expanded separately: later flags override the file even if the two use different names
        given = _today(read_flags(Path(expanded(argv[0], argv[0])), flags), known)
        argv = argv[1:]
    given += _today(_split(argv), known)
    for name, _ in given:
        if name not in known:
            _refuse_unknown(name, known)
    return given


def known_names(flags: Mapping[str, Flag]) -> set[str]:
    """All flag names; a boolean flag that defaults to True can also be given as --no_name."""
    return {*flags, *(f"no_{flag.name}" for flag in flags.values() if flag.kind is bool and flag.default is True)}


def _split(argv: list[str]) -> list[tuple[str | None, list[str]]]:
    """Groups words as (flag without dashes, its values); values before the first flag have flag None."""
    groups: list[tuple[str | None, list[str]]] = []
    for word in argv:
        if word == "-h":
            groups.append(("help", []))
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((None, [word]))
    return groups


def _today(groups: list[tuple[str | None, list[str]]], known: set[str]) -> Given:
    """Renames flags of earlier pipelines, with one log line for each."""
    given: Given = []
    for name, values in groups:
        if name is None:
            raise ArgumentError(f"expected a flag that starts with --, found {values[0]!r}")
        other = {"warmup_ratio": "warmup_steps", "warmup_steps": "warmup_ratio"}.get(name)
        if other and "warmup_steps" in known and _yields(name, values, dict(groups).get(other)):
            logger.info(f"--{name} {' '.join(values)} is left out: --{other} is given as well")
            continue
        if name not in known or RENAMED.get(name) in known:
            name, values = _rewritten(name, values, known)
            if name is None:
                continue
        if name == "optim" and values and values[0] in RENAMED_OPTIMIZERS:
            logger.info(f"--optim {values[0]} is --optim {RENAMED_OPTIMIZERS[values[0]]} today")
            values = [RENAMED_OPTIMIZERS[values[0]]]
        given.append((name, values))
    return given


def _yields(name: str, values: list[str], others: list[str] | None) -> bool:
    """Resolves --warmup_steps and --warmup_ratio, which are one flag today; steps win if both are above zero.

    Values below 1 for steps are a ratio, as in the recipes: then the last flag counts, as for any other flag.
    """
    if others is None:
        return False
    try:
        steps = float((others if name == "warmup_ratio" else values)[-1])
    except (IndexError, ValueError):  # the parser refuses them
        return False
    return steps == 0 if name == "warmup_steps" else steps >= 1


def _rewritten(name: str, values: list[str], known: set[str]) -> tuple[str | None, list[str]]:
    asked = not (values and values[0].lower() in FALSE_WORDS)
    if name in ALWAYS_SO:
        logger.info(f"--{name} is no longer a flag: {ALWAYS_SO[name]}")
        return None, []
    if name == "group_by_length":
        logger.info(f"--group_by_length is --train_sampling_strategy {'group_by_length' if asked else 'random'} today")
        return ("train_sampling_strategy", ["group_by_length"]) if asked else (None, [])
    if name in ("quantization", "quantization_bit") and "load_in_4bit" in known:
        return _quantization(name, values, asked)
    if name in NOT_YET:
        if asked:
            raise ArgumentError(f"--{name}: not in this version. {NOT_YET[name][0].upper()}{NOT_YET[name][1:]}.")
        return None, []
    if name in RENAMED and RENAMED[name] in known:
        logger.info(f"--{name} is --{RENAMED[name]} today")
        return RENAMED[name], values
    return name, values


def _quantization(name: str, values: list[str], asked: bool) -> tuple[str | None, list[str]]:
    """Reads `--quantization bnb --quantization_bit 4`, the former spelling of --load_in_4bit."""
    value = values[0] if values else ""
    if not asked or (name, value) == ("quantization", "bnb"):
        return None, []
    if name == "quantization_bit" and value in ("4", "8"):
        logger.info(f"--quantization_bit {value} is --load_in_{value}bit today")
        return f"load_in_{value}bit", ["True"]
    raise ArgumentError(
        f"--{name} {value}: a model is quantized while it loads by bitsandbytes alone: --load_in_4bit, --load_in_8bit "
        "or --qlora"
    )


def _refuse_unknown(name: str, known: set[str]) -> None:
    begun = sorted(other for other in known if len(name) > 2 and other.startswith(name))
    near = begun or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; the nearest known flag is --{near[0]}" if near else ""
    if name in {part.name for part in dataclasses.fields(LanguageModelArguments)}:
        hint = "; only pretraining.py and supervised_finetuning.py have it"
    if name in {part.name for part in dataclasses.fields(ChatArguments)}:
        hint = "; the stages that read conversations have it"
    raise ArgumentError(f"--{name}: no such flag{hint}. --help lists all flags")
