"""Tokenizer, config and weights: from a local directory, a Hugging Face hub or mirror, or ModelScope."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from loguru import logger
from packaging.version import Version
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import stagewise.row_quantisation  # noqa: F401  (from_pretrained then knows models saved in that form)
from stagewise.arguments import ArgumentError, ModelArguments
from stagewise.attention import choose_attention
from stagewise.rope import scale_rope
from stagewise.router import check_router

MODELSCOPE_PREFIX = "modelscope://"
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

# The lower bound of requirements.txt: names and defaults of loading differ before it.
if Version(transformers.__version__) < Version("5.17"):
    raise ImportError(f"transformers {transformers.__version__} is too old: pip install 'transformers>=5.17'")


class ModelError(ArgumentError):
    """A model or tokenizer that cannot be used; the message names the flag, what was found and what to do."""


# --------------------------------------------------------------------------------------------------- where it lies


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


# ------------------------------------------------------------------------------------------------ tokenizer, config


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of --tokenizer_name_or_path, else of --model_name_or_path.

    A tokenizer without a pad token gets its unknown token for it, else its end token; padding is never learned from,
    since collators mask it by length.

    Raises:
        ModelError: naming the flag.
    """
    flag = "tokenizer_name_or_path" if args.tokenizer_name_or_path else "model_name_or_path"
    source = find_source(args.tokenizer_name_or_path or args.model_name_or_path, args, flag)
    if flag == "model_name_or_path":
        refuse_adapter(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(source, args))
    except (OSError, ValueError) as error:
        raise ModelError(f"--{flag} {source}: no tokenizer could be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.unk_token or tokenizer.eos_token
        if substitute is None:
            raise ModelError(f"--{flag} {source}: the tokenizer names no pad, unknown or end token; add one to it")
        tokenizer.pad_token = substitute
        logger.info(f"tokenizer: it has no pad token; {substitute!r} pads")
    return tokenizer


def load_config(args: ModelArguments) -> PretrainedConfig:
    """Loads config.json, checks --model_type against it, and scales its positions as --rope_scaling asks.

    Raises:
        ModelError: for an adapter directory, an architecture that transformers does not know, code that would have
            to be trusted, or another --model_type.
    """
    source = find_source(args.model_name_or_path, args)
    refuse_adapter(source)
    try:
        config = AutoConfig.from_pretrained(source, **hub_options(source, args))
    except (OSError, ValueError, KeyError, ImportError) as error:
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
        raise ModelError(f"--model_name_or_path {source}: {hint} ({error})") from error
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


# ---------------------------------------------------------------------------------------------------------- weights


def load_causal_lm(
    args: ModelArguments,
    *,
    attn_implementation: str | None = None,
    for_training: bool = True,
    deepspeed_zero3: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in the precision of --torch_dtype.

    Args:
        args: the model flags.
        attn_implementation: default: what `choose_attention` says.
        for_training: leaves the model in train mode and refuses a placement whose weights are partly on disk.
        deepspeed_zero3: the weights are partitioned while they load; --device_map is refused.
        tokenizer: if given, its length is checked against the rows of the embedding.

    Raises:
        ModelError: also when weights are missing from the checkpoint, which transformers would fill at random.
    """
    config = load_config(args)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise ModelError(f"--model_name_or_path {args.model_name_or_path}: a reward model has no language-model head")
    model, missing = _load(AutoModelForCausalLM, args, config, attn_implementation, for_training, deepspeed_zero3)
    if missing:
        raise ModelError(f"--model_name_or_path {args.model_name_or_path}: the checkpoint lacks {_listed(missing)}")
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    return model


class Float32Linear(nn.Linear):
    """A scalar head in float32 on a 16-bit model: its updates are smaller than 16 bit can hold."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) in any precision → (…, labels)."""
        return super().forward(hidden.to(self.weight.dtype))


def reward_config(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> PretrainedConfig:
    """The config of a reward model on this base: one label, and the pad id that says where a row ends.

    Raises:
        ModelError: for an architecture without a sequence-classification class.
    """
    text = config.get_text_config()
    # the scalar head of a family with images or sound is on its text model
    known = next((c for c in (config, text) if type(c) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING), None)
    if known is None:
        raise ModelError(
            f"--model_name_or_path {name}: transformers has no sequence-classification class for "
            f"{config.model_type!r}, so it cannot be a reward model; use another family, e.g. llama"
        )
    known.num_labels, known.pad_token_id = 1, tokenizer.pad_token_id
    known.get_text_config().pad_token_id = tokenizer.pad_token_id
    return known


def load_reward_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attn_implementation: str | None = None,
    for_training: bool = True,
    deepspeed_zero3: bool = False,
    float32_head: bool = True,
) -> PreTrainedModel:
    """Loads a model with one scalar score, read at a row's last token that is not padding.

    The head `score` is kept if the checkpoint has one, else it is new (said aloud).

    Args:
        float32_head: a new head's updates are smaller than 16 bit holds. False where DeepSpeed's ZeRO-3 trains all
            weights: it takes trained parameters of one precision alone, and keeps a float32 copy of them itself.

    Raises:
        ModelError: also for an architecture without a sequence-classification class.
    """
    config = reward_config(load_config(args), tokenizer, args.model_name_or_path)
    auto = AutoModelForSequenceClassification
    model, missing = _load(auto, args, config, attn_implementation, for_training, deepspeed_zero3)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(f"--model_name_or_path: {type(model).__name__} has no linear head named `score`")
    lost = sorted(name for name in missing if name != "score.weight")
    if lost:
        raise ModelError(f"--model_name_or_path {args.model_name_or_path}: the checkpoint lacks {_listed(lost)}")
    check_vocabulary(model, tokenizer)
    logger.info(f"reward head: {'new' if missing else 'from the checkpoint'}")
    if for_training and float32_head and model.score.weight.dtype != torch.float32:
        with whole_weights(model.score):
            weight = model.score.weight.detach().float().clone()
        head = Float32Linear(weight.shape[1], len(weight), bias=False, device=weight.device)
        head.weight = nn.Parameter(weight)
        model.score = head
    return model


def whole_weights(module: nn.Module) -> AbstractContextManager:
    """A context in which a module that ZeRO-3 partitioned has its whole weights; elsewhere it does nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def _load(
    auto: type, args: ModelArguments, config: PretrainedConfig, attention: str | None, for_training: bool, zero3: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the weights; returns the model and the names that the checkpoint did not have."""
    source = find_source(args.model_name_or_path, args)
    attention = attention or choose_attention(config, args)
    dtype = "auto" if args.torch_dtype == "auto" else DTYPES[args.torch_dtype]
    try:
        model, info = auto.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            device_map=choose_device_map(args, deepspeed_zero3=zero3),
            output_loading_info=True,
            **quantisation_options(args, config),
            **hub_options(source, args),
        )
    except torch.OutOfMemoryError:
        raise  # the run has its own advice
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"--model_name_or_path {source}: {error}") from error
    guard_4bit(model)
    guard_8bit(model)
    if args.bits == 4 and args.quantize_experts:
        quantise_experts(model, twice=args.qlora)
    held = f", linear layers in {args.bits} bit" if args.bits else ""
    placed = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if for_training and len(placed) > 1 and placed & {"cpu", "disk"}:
        raise ModelError(
            f"--device_map {args.device_map}: the model does not fit on the GPUs ({', '.join(sorted(placed))})"
        )
    model.train(for_training)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    logger.info(
        f"model: {source}, {type(model).__name__}, {size / 1e6:,.1f} M parameters in {model.dtype}{held}, {attention}"
    )
    return model, sorted(info["missing_keys"])


def quantisation_options(args: ModelArguments, config: PretrainedConfig) -> dict[str, Any]:
    """from_pretrained's options for a base that is quantised while it loads; none where it is not.

    4 bit is nf4, which follows the weights' distribution (https://arxiv.org/abs/2305.14314); --qlora quantises the
    scales of its blocks, too. The output head, and what an adapter trains in full, stay as they are.

    Raises:
        ModelError: for a checkpoint that is quantised already.
    """
    if args.bits is None:
        return {}
    flag = "--qlora" if args.qlora else f"--load_in_{args.bits}bit"
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{flag}: {args.model_name_or_path} is quantised already; leave the flag out")
    if args.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    own = config.get_text_config().dtype or torch.float32
    compute = (own if isinstance(own, torch.dtype) else DTYPES[own]) if args.torch_dtype == "auto" else None
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=args.qlora,
        bnb_4bit_compute_dtype=compute or DTYPES[args.torch_dtype],
    )
    return {"quantization_config": how}


def quantise_experts(model: nn.Module, *, twice: bool) -> None:
    """Holds experts that are one 3-D parameter in 4 bit, too: no linear layers, which from_pretrained leaves alone.

    They come back to the precision of their scales for each forward pass, and get no gradient.

    Args:
        model: loaded with its linear layers in 4 bit; changed in place.
        twice: quantise the scales once more.
    """
    experts = [
        (module, name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{path}.{name}"
    ]
    if not experts:
        return
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module, name in experts:
        replace_parameter_4bit(module, name, compress_statistics=twice, quant_type="nf4")
    logger.info(f"experts: {len(experts)} 3-D parameters in 4 bit (--quantize_experts False leaves them)")


def choose_device_map(args: ModelArguments, *, deepspeed_zero3: bool = False) -> str | dict[str, Any] | None:
    """The device map that from_pretrained gets; each of several processes holds its own whole model.

    Raises:
        ModelError: for a map that cannot take effect.
    """
    if args.device_map in (None, "", "None", "none"):
        # bitsandbytes quantises on the device on which the model then stays; --use_cpu is in accelerate's state alone.
        return {"": PartialState().device} if args.bits and PartialState._shared_state else None
    if deepspeed_zero3:
        raise ModelError("--device_map has no effect under ZeRO-3, which places the weights: leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if args.device_map != "auto":
            raise ModelError(f"--device_map {args.device_map} has no effect with several processes: leave it out")
        logger.info("--device_map auto: each process holds the whole model on its own device")
        return None
    return args.device_map


def guard_4bit(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU, after which LoRA gradients and merges are wrong.

    Call it right after every load. It can go once bitsandbytes (0.50.2 tested) repacks a copy.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def guard_8bit(model: nn.Module) -> None:
    """Keeps the scales of 8-bit weights on a CPU, where PEFT's DoRA makes each weight anew without them.

    bitsandbytes takes the scales that a layer computes with from its weight whenever that is new. It can go once PEFT
    (0.21.2 tested) leaves the weight alone.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.init_8bit_state = partial(_take_state, module)


def _take_state(layer: nn.Module) -> None:
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    type(layer).init_8bit_state(layer)
    layer.state.SCB = scales


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if the tokenizer has ids for which the model has no row."""
    rows = model.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} entries, the model's embedding {rows} rows: give the tokenizer that "
            "belongs to the model with --tokenizer_name_or_path"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------- generation config


def finish_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str | Sequence[str] | None
) -> None:
    """Makes the model's generation_config end at the template's end marker, in place; it can then be saved.

    Args:
        model: a model, also with an adapter around it.
        tokenizer: gives the end and pad ids; pad may equal end.
        stop: the template's end marker, or all of them; None: the tokenizer's end token alone.

    Raises:
        ModelError: if there is nothing to end at.
    """
    config = model.generation_config
    ends: list[int] = []
    config.stop_strings = None
    for text in [stop] if isinstance(stop, str) else stop or []:
        marker = tokenizer(text, add_special_tokens=False).input_ids
        if len(marker) == 1:
            ends.append(marker[0])
        else:
            config.stop_strings = [*(config.stop_strings or []), text]
            logger.info(
                f"generation: the end marker {text!r} is {len(marker)} tokens here; it is kept as a stop string"
            )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ModelError(f"the tokenizer has no end token and {stop!r} is not one token: answers would never end")
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.pad_token_id = ends[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    if not config.do_sample:
        # Published configs leave sampling values beside greedy search, which save_pretrained refuses.
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)
    config.validate(strict=True)
