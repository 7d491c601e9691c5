"""Flags that two or more stages share, declared once, and the strict parser every stage uses.

A command line may start with a `.yaml` or `.json` file of flags; flags after it override the file. Names that earlier
pipelines used are taken as what they meant, with one line that says today's name. A flag that this version does not
have ends the program with the nearest known name; a flag that would have no effect is an error, never ignored.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from loguru import logger
from transformers.hf_argparser import HfArgumentParser, string_to_bool

FALSE_WORDS = {"false", "no", "0", "none", "off"}
ROPE_SCALINGS = ("linear", "dynamic", "yarn", "longrope")


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
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the linear layers in 4 bit (nf4, bitsandbytes)."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the linear layers in 8 bit (bitsandbytes)."})
    qlora: bool = field(
        default=False, metadata={"help": "4 bit as QLoRA does it: nf4, its scales quantised once more."}
    )
    quantize_experts: bool = field(
        default=True,
        metadata={"help": "4 bit: experts held as one 3-D parameter, too; False: they stay in 16 bit."},
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={"help": "Longer context by scaled positions: linear, dynamic (NTK), yarn or longrope."},
    )
    rope_factor: float | None = field(
        default=None,
        metadata={"help": "How many times the model's own context; default: as many as the run's length needs."},
    )
    rope_factors_file: str | None = field(
        default=None, metadata={"help": "longrope: json file with its lists short_factor and long_factor."}
    )
    router_aux_loss: bool = field(
        default=False,
        metadata={"help": "Mixture of experts: add the routers' loss, which keeps the experts in use alike."},
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of --router_aux_loss; default: the checkpoint's own."}
    )
    flash_attn: bool = field(
        default=False,
        metadata={"help": "FlashAttention where installed, else torch's fastest exact attention on this GPU."},
    )
    shift_attn: bool = field(
        default=False, metadata={"help": "Shifted sparse attention (S²-Attn) in training; full attention elsewhere."}
    )
    shift_group_ratio: float = field(default=0.25, metadata={"help": "--shift_attn: a group's share of the row."})

    # (flag, tokens): the length that the run trains on, which `check_shared` finds among the other flags. No flag.
    rope_length = None
    # "rope" of run.json: how positions were scaled where the adapter that is to be put on this model was trained.
    kept_rope = None

    @property
    def bits(self) -> int | None:
        """4 or 8 where the base is quantised while it loads, else None."""
        return 4 if self.load_in_4bit or self.qlora else 8 if self.load_in_8bit else None


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
    fine_tuning_type: str = field(
        default="lora",
        metadata={
            "help": "full (the same as --use_peft False), lora, adalora, prompt_tuning, p_tuning or prefix_tuning."
        },
    )
    target_modules: str = field(default="all", metadata={"help": "`all` linear layers, or names joined by commas."})
    lora_rank: int = field(default=8, metadata={"help": "Rank r of the adapter."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale: the adapter's output times alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    modules_to_save: str | None = field(
        default=None, metadata={"help": "Modules trained in full beside the adapter, e.g. embed_tokens,lm_head."}
    )
    peft_path: str | None = field(default=None, metadata={"help": "Adapter to go on from."})
    longlora_plus: bool = field(
        default=True, metadata={"help": "With --shift_attn: embedding and norms train in full beside the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "LoRA's scale is alpha / sqrt(r) (rsLoRA)."})
    use_dora: bool = field(
        default=False, metadata={"help": "Weights are split into magnitude and direction; LoRA turns the latter."}
    )
    init_lora_weights: str = field(
        default="default",
        metadata={
            "help": "LoRA's start: default (B = 0), gaussian, or pissa (the base's largest singular directions)."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the learning rate of B is this many times that of A."}
    )
    init_r: int = field(default=12, metadata={"help": "AdaLoRA: rank of each matrix at first."})
    target_r: int = field(default=8, metadata={"help": "AdaLoRA: average rank at the end."})
    tinit: int = field(default=0, metadata={"help": "AdaLoRA: steps before ranks begin to fall."})
    tfinal: int = field(default=0, metadata={"help": "AdaLoRA: steps at the end in which ranks stay as they are."})
    deltaT: int = field(default=1, metadata={"help": "AdaLoRA: ranks are chosen anew every so many steps."})
    beta1: float = field(default=0.85, metadata={"help": "AdaLoRA: how slowly a weight's importance is averaged."})
    beta2: float = field(default=0.85, metadata={"help": "AdaLoRA: how slowly its uncertainty is averaged."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "AdaLoRA: weight of the term that keeps its matrices orthogonal."}
    )
    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Prompt, P- and prefix tuning: learned tokens before the text."}
    )
    encoder_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "P-tuning, and prefix tuning with --prefix_projection: width of the network that the virtual "
            "tokens are trained through; default: the embedding's."
        },
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "Prefix tuning: train the prefix through a network of two layers."}
    )
    # Names of the flags that stood on the command line, also with their default values; set by `run.start`.
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    @property
    def trains_adapter(self) -> bool:
        return self.use_peft and self.fine_tuning_type != "full"

    @property
    def method(self) -> str:
        """One of METHODS."""
        return self.fine_tuning_type if self.use_peft else "full"

    @property
    def padded_because(self) -> str | None:
        """Why rows cannot be packed with this method, or None."""
        if self.method not in VIRTUAL_TOKENS:
            return None
        return f"{self.method}: the virtual tokens stand before a row, not before each of its documents"

    def asks(self, name: str) -> bool:
        """Whether a flag was given, or has a value that is not its default."""
        default = next(f.default for f in dataclasses.fields(self) if f.name == name)
        return name in self.given or getattr(self, name) != default


VIRTUAL_TOKENS = ("prompt_tuning", "p_tuning", "prefix_tuning")
_LAYERS = ("target_modules", "lora_alpha", "lora_dropout", "modules_to_save")
_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
# Method -> the flags that say how it is done.
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": (*_LAYERS, "lora_rank", "use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"),
    "adalora": (*_LAYERS, *_SCHEDULE),
    "prompt_tuning": ("num_virtual_tokens",),
    "p_tuning": ("num_virtual_tokens", "encoder_hidden_size"),
    "prefix_tuning": ("num_virtual_tokens", "encoder_hidden_size", "prefix_projection"),
}


# Flags of later versions: given with a value that asks for them, they are refused by name.
NOT_YET = {
    "cpm_quantization_target": "train with --qlora; tools.quantize_model writes the CPM form of a finished model",
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
    "quantization": "load_in_4bit",  # these two by `_quantisation`, which reads the value
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


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it is written, each flag under one name, and defaults where there are any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next((o for o in action.option_strings if o.startswith("--")), "")
        takes = "" if action.nargs == 0 else " " + ("True|False" if action.nargs == "?" else name[2:].upper())
        return name + takes

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, argparse.SUPPRESS) or action.nargs == 0
        return action.help if silent else f"{action.help.rstrip('.')} (default: {action.default})."


def parse(
    dataclass_types: list[type],
    argv: list[str] | None = None,
    before: Callable[[list[str]], list[str]] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parses a stage's command line strictly.

    Args:
        dataclass_types: the stage's dataclasses; every field is a flag.
        argv: words after the script's name; default `sys.argv[1:]`.
        before: is given the words, in today's names, before any dataclass is made from them; returns the words to use.
        description: what --help shows above the flags, as it is.

    Returns:
        one instance for each dataclass, in order.

    Raises:
        ArgumentError: for an unknown flag (with the nearest known name), a flag of a later version, or a bad file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # argparse's own usage names every flag: pages before the one line that says what is wrong
    shape = {"usage": "%(prog)s [flags.yaml] --flag value …", "description": description}
    if description:
        shape["formatter_class"] = Help
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False, **shape)
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # bool | None: alone it means True, as bool does
            action.nargs, action.const = "?", True
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        several = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
        argv = _words_of_file(Path(argv[0]), several) + argv[1:]
    argv = _today(argv, known)
    _refuse_unknown(argv, known)
    if before:
        argv = before(argv)
    return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)


def _words_of_file(path: Path, several: set[str]) -> list[str]:
    """A file of flags as command-line words; null is left out.

    A list becomes a word for each value where the flag is in `several`, which take many; else one, joined by commas.
    """
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
        name = str(name).lstrip("-").replace("-", "_")
        if name in several and isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
            continue
        if value is None:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{name}", str(value)]
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
    if name in ("quantization", "quantization_bit") and "load_in_4bit" in known:
        return _quantisation(name, values, asked)
    if name in NOT_YET:
        if asked:
            raise ArgumentError(f"--{name}: not in this version. {NOT_YET[name][0].upper()}{NOT_YET[name][1:]}.")
        return None, []
    if name in RENAMED and RENAMED[name] in known:
        logger.info(f"--{name} is --{RENAMED[name]} today")
        return RENAMED[name], values
    return name, values


def _quantisation(name: str, values: list[str], asked: bool) -> tuple[str | None, list[str]]:
    """`--quantization bnb --quantization_bit 4`, which earlier pipelines said for --load_in_4bit."""
    value = values[0] if values else ""
    if not asked or (name, value) == ("quantization", "bnb"):
        return None, []
    if name == "quantization_bit" and value in ("4", "8"):
        logger.info(f"--quantization_bit {value} is --load_in_{value}bit today")
        return f"load_in_{value}bit", ["True"]
    raise ArgumentError(
        f"--{name} {value}: a model is quantised while it loads by bitsandbytes alone: --load_in_4bit, --load_in_8bit "
        "or --qlora"
    )


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
    longest = longest_row(arguments)
    if longest is not None and longest[1] < 1:
        raise ArgumentError(f"{longest[0]}: expected at least 1, found {longest[1]}")


def longest_row(parts: Sequence[Any]) -> tuple[str, int] | None:
    """The flag that says how long a stage's rows get, and its tokens; None where no flag does."""
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
    # PEFT's faster forms of PiSSA draw random numbers, which loading such an adapter would draw anew.
    check_choice("init_lora_weights", adapter.init_lora_weights, ("default", "gaussian", "pissa"))
    if not adapter.peft_path:  # else the adapter says which method it is
        check_flags_of_method(adapter)


def check_flags_of_method(adapter: AdapterArguments) -> None:
    """Raises ArgumentError for a flag of another method than the one that is trained."""
    method = adapter.method
    for name in sorted({name for names in METHODS.values() for name in names} - set(METHODS[method])):
        # No dropout, no projection … is true of every method.
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
