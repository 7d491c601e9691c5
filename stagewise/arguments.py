"""Flags that two or more stages share, declared once, and the strict parser every stage uses.

A command line may start with a `.yaml` or `.json` file of flags; flags after it override the file. Names that earlier
pipelines used are taken as what they meant, with one line that says today's name. A flag that this version does not
have ends the program with the nearest known name; a flag that would have no effect is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from loguru import logger
from transformers.hf_argparser import HfArgumentParser, string_to_bool

FALSE_WORDS = {"false", "no", "0", "none", "off"}


class ArgumentError(ValueError):
    """A flag that cannot be honoured; the message names the flag, what was found and what to do."""


@dataclass
class ModelArguments:
    """Which model, from where, in which precision."""

    model_name_or_path: str = field(metadata={"help": "Model directory, or a hub name."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    model_type: str = field(
        default="auto",
        metadata={"help": "Architecture you expect (llama, qwen3, bloom …); checked against the config."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where downloads and encoded data are cached; encoded data is cached only here."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    hf_hub_token: str | None = field(default=None, metadata={"help": "Token for a private hub model."})
    torch_dtype: str = field(
        default="auto", metadata={"help": "Weights' precision: auto (the checkpoint's), float32, bfloat16, float16."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads one process's model over its GPUs; not with torchrun."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model repository ships."}
    )


@dataclass
class DataArguments:
    """Which records are trained on and which are held out."""

    train_file_dir: str | None = field(
        default=None,
        metadata={"help": "File, or folder searched with its subfolders; several joined by commas; or a .yaml list."},
    )
    data_weights: str | None = field(
        default=None, metadata={"help": "Shares of the sources of --train_file_dir, joined by commas: 0.7,0.3."}
    )
    deduplicate: bool = field(default=False, metadata={"help": "Leave out training records that were read before."})
    validation_file_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    dataset_name: str | None = field(default=None, metadata={"help": "A `datasets` set: hub name or local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that set."})
    validation_split_percentage: int | None = field(
        default=None, metadata={"help": "Hold out this share of the training records, if no validation set is given."}
    )
    max_train_samples: int = field(default=-1, metadata={"help": "Use at most this many training records; -1 = all."})
    max_eval_samples: int = field(default=-1, metadata={"help": "The same for validation records."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that encode the data; default: one a core, at most four."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Encode again what --cache_dir already holds."})
    on_bad_record: str = field(
        default="error", metadata={"help": "error: stop at the first; skip: count it, write it to rejected.jsonl."}
    )


@dataclass
class ChatArguments:
    """How a conversation becomes text."""

    template_name: str | None = field(
        default=None, metadata={"help": "Chat template of template.py; default: the tokenizer's own, else vicuna."}
    )
    force_template: bool = field(
        default=False, metadata={"help": "Use --template_name although the model was trained in another template."}
    )
    enable_thinking: bool | None = field(
        default=None,
        metadata={"help": "Answers of a thinking model begin with its thoughts; False: with none. Default: its own."},
    )


@dataclass
class PairArguments:
    """Length limits of prompt and answer."""

    max_source_length: int = field(default=2048, metadata={"help": "Tokens of the prompt with its history."})
    max_target_length: int = field(default=512, metadata={"help": "Tokens of an answer."})


@dataclass
class LanguageModelArguments:
    """How rows for the language-model loss are made."""

    packing: bool = field(
        default=True, metadata={"help": "Several records in one row, attending only to themselves; False: padded."}
    )
    neft_alpha: float | None = field(
        default=None, metadata={"help": "NEFTune: noise on the embeddings, uniform within ±alpha / sqrt(L d)."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the files while training, in constant memory; needs --max_steps."}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Records that --streaming shuffles among."})


@dataclass
class AdapterArguments:
    """What is trained: an adapter, or all weights."""

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; False trains all weights."})
    fine_tuning_type: str = field(default="lora", metadata={"help": "lora, or full (the same as --use_peft False)."})
    target_modules: str = field(default="all", metadata={"help": "`all` linear layers, or names joined by commas."})
    lora_rank: int = field(default=8, metadata={"help": "Rank r of the adapter."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale: the adapter's output times alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    modules_to_save: str | None = field(
        default=None, metadata={"help": "Modules trained in full beside the adapter, e.g. embed_tokens,lm_head."}
    )
    peft_path: str | None = field(default=None, metadata={"help": "Adapter to go on from."})

    @property
    def trains_adapter(self) -> bool:
        return self.use_peft and self.fine_tuning_type != "full"


# Flags of later versions: given with a value that asks for them, they are refused by name.
NOT_YET = {
    "qlora": "load in 16 bit with --torch_dtype bfloat16",
    "load_in_4bit": "load in 16 bit with --torch_dtype bfloat16",
    "load_in_8bit": "load in 16 bit with --torch_dtype bfloat16",
    "quantization": "load in 16 bit with --torch_dtype bfloat16",
    "quantization_bit": "load in 16 bit with --torch_dtype bfloat16",
    "cpm_quantization_target": "load in 16 bit with --torch_dtype bfloat16",
    "rope_scaling": "train within the model's own context",
    "rope_factor": "train within the model's own context",
    "flash_attn": "leave it out: the exact attention of torch runs",
    "shift_attn": "leave it out: full attention runs",
}

# Names of earlier pipelines -> today's name; the value is taken over as it is.
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
    "neftune_noise_alpha": "neft_alpha",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "train_dir": "train_file_dir",
    "validation_dir": "validation_file_dir",
}

# Names that transformers dropped because what they asked for is now always so.
ALWAYS_SO = {
    "use_fast_tokenizer": "transformers 5 has one kind of tokenizer, the fast one",
    "save_safetensors": "weights are always saved as safetensors",
    "half_precision_backend": "torch's own autocast is used",
    "fp16_opt_level": "torch's own autocast is used",
    "include_tokens_per_second": "the samples and steps a second are always logged",
    "low_cpu_mem_usage": "weights are always loaded without a second copy",
}
OPTIMIZERS = {"adamw_hf": "adamw_torch"}


def parse(
    dataclass_types: list[type],
    argv: list[str] | None = None,
    before: Callable[[list[str]], list[str]] | None = None,
) -> tuple[Any, ...]:
    """Parses a stage's command line strictly.

    Args:
        dataclass_types: the stage's dataclasses; every field is a flag.
        argv: words after the script's name; default `sys.argv[1:]`.
        before: is given the words, in today's names, before any dataclass is made from them; returns the words to use.

    Returns:
        one instance for each dataclass, in order.

    Raises:
        ArgumentError: for an unknown flag (with the nearest known name), a flag of a later version, or a bad file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        argv = _words_of_file(Path(argv[0])) + argv[1:]
    # argparse's own usage names every flag: pages before the one line that says what is wrong
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False, usage="%(prog)s [flags.yaml] --flag value …")
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # bool | None: alone it means True, as bool does
            action.nargs, action.const = "?", True
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    argv = _today(argv, known)
    _refuse_unknown(argv, known)
    if before:
        argv = before(argv)
    return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)


def _words_of_file(path: Path) -> list[str]:
    """A file of flags as command-line words; lists are joined by commas, null is left out."""
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file of flags")
    text = path.read_text(encoding="utf-8")
    try:
        flags = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: not valid {path.suffix[1:]}: {error}") from error
    if not isinstance(flags, dict):
        raise ArgumentError(f"{path}: expected flags and their values, found {type(flags).__name__}")
    words: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{str(name).lstrip('-')}", str(value)]
    return words


def _split(argv: list[str]) -> list[tuple[str | None, list[str]]]:
    """Words grouped as (flag without dashes, its values); values before the first flag have flag None."""
    groups: list[tuple[str | None, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((None, [word]))
    return groups


def _today(argv: list[str], known: set[str]) -> list[str]:
    """Flags of earlier pipelines rewritten to today's, each with one line that says so."""
    words: list[str] = []
    for name, values in _split(argv):
        if name is None:
            raise ArgumentError(f"expected a flag that starts with --, found {values[0]!r}")
        if name not in known or RENAMED.get(name) in known:
            name, values = _rewritten(name, values, known)
            if name is None:
                continue
        if name == "optim" and values and values[0] in OPTIMIZERS:
            logger.info(f"--optim {values[0]} is --optim {OPTIMIZERS[values[0]]} today")
            values = [OPTIMIZERS[values[0]]]
        words += [f"--{name}", *values]
    return words


def _rewritten(name: str, values: list[str], known: set[str]) -> tuple[str | None, list[str]]:
    asked = not (values and values[0].lower() in FALSE_WORDS)
    if name in ALWAYS_SO:
        logger.info(f"--{name} is no flag any more: {ALWAYS_SO[name]}")
        return None, []
    if name == "group_by_length":
        logger.info(f"--group_by_length is --train_sampling_strategy {'group_by_length' if asked else 'random'} today")
        return ("train_sampling_strategy", ["group_by_length"]) if asked else (None, [])
    if name in NOT_YET:
        if asked:
            raise ArgumentError(f"--{name}: not in this version. {NOT_YET[name][0].upper()}{NOT_YET[name][1:]}.")
        return None, []
    if name in RENAMED and RENAMED[name] in known:
        logger.info(f"--{name} is --{RENAMED[name]} today")
        return RENAMED[name], values
    return name, values


def _refuse_unknown(argv: list[str], known: set[str]) -> None:
    for name, _ in _split(argv):
        if name not in known:
            near = difflib.get_close_matches(name or "", known, n=1, cutoff=0.5)
            hint = f"; the nearest known flag is --{near[0]}" if near else ""
            if name in {part.name for part in dataclasses.fields(LanguageModelArguments)}:
                hint = "; only pretraining.py and supervised_finetuning.py have it"
            if name in {part.name for part in dataclasses.fields(ChatArguments)}:
                hint = "; the stages that read conversations have it"
            raise ArgumentError(f"--{name}: no such flag{hint}. --help lists all flags")


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ArgumentError that names the flag unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(f"--{flag}: expected one of {', '.join(choices)}, found {value!r}")


def check_shared(*arguments: Any) -> None:
    """Checks that join flags of the shared dataclasses, before anything is loaded.

    Raises:
        ArgumentError: naming the flags that do not fit together and what to do.
    """
    for part in arguments:
        if isinstance(part, ModelArguments):
            check_choice("torch_dtype", part.torch_dtype, ("auto", "float32", "bfloat16", "float16"))
        elif isinstance(part, DataArguments):
            _check_data(part)
        elif isinstance(part, PairArguments):
            for name in ("max_source_length", "max_target_length"):
                if getattr(part, name) < 1:
                    raise ArgumentError(f"--{name}: expected at least 1, found {getattr(part, name)}")
        elif isinstance(part, AdapterArguments):
            _check_adapter(part)


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
        raise ArgumentError(
            "--validation_split_percentage has no effect beside --validation_file_dir: give one of them"
        )
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(data, name)
        if value != -1 and value < 1:
            raise ArgumentError(f"--{name}: expected -1 (all) or at least 1, found {value}")
    if data.preprocessing_num_workers is not None and data.preprocessing_num_workers < 1:
        raise ArgumentError(
            f"--preprocessing_num_workers: expected at least 1, found {data.preprocessing_num_workers}"
        )


def _check_adapter(adapter: AdapterArguments) -> None:
    later = ("adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "qlora")
    if adapter.fine_tuning_type in later:
        raise ArgumentError(f"--fine_tuning_type {adapter.fine_tuning_type}: not in this version. Use lora or full.")
    check_choice("fine_tuning_type", adapter.fine_tuning_type, ("lora", "full"))
    if adapter.lora_rank < 1:
        raise ArgumentError(f"--lora_rank: expected at least 1, found {adapter.lora_rank}")
    if adapter.trains_adapter:
        return
    defaults = {f.name: f.default for f in dataclasses.fields(AdapterArguments)}
    if adapter.modules_to_save or adapter.peft_path:
        name = "modules_to_save" if adapter.modules_to_save else "peft_path"
        raise ArgumentError(f"--{name} has no effect when all weights are trained: leave it out, or --use_peft True")
    for name in ("target_modules", "lora_rank", "lora_alpha", "lora_dropout"):
        if getattr(adapter, name) not in (defaults[name], 0):  # no dropout is true of full training, too
            raise ArgumentError(
                f"--{name} belongs to an adapter and has no effect when all weights are trained: leave it out"
            )
