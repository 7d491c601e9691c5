"""Chooses the attention implementation, and whether packed documents stay separate in it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from loguru import logger
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from stagewise.config.arguments import ModelArguments
from stagewise.errors import ArgumentError
from stagewise.models.attention.rope import rotations
from stagewise.models.attention.sdpa import FASTEST, HOPPER
from stagewise.models.attention.shifted import is_shifted, register_shifted

# Families whose packed logits equal those of single documents, with use_cache=False and no attention_mask; see
# tests/models/attention/test_choose.py.
PACKS_EXACTLY = frozenset(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"))
# Their inverse frequencies depend on the longest position in the row, so a document alone gets others.
ROW_DEPENDENT_ROPE = ("dynamic", "longrope")
SHIFTED = "--shift_attn cuts a row into groups, which belong to one document"  # why its rows are not packed
PROBE_LENGTHS = (5, 9, 7)
# Root mean square of (packed - alone) relative to the logits: rounding is below, a leak is 0.1 or more.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def choose_attention(config: PretrainedConfig, args: ModelArguments | None = None) -> str:
    """Chooses the name for `attn_implementation`, and logs one line with the reason.

    The default is "sdpa", or "eager" for an architecture without scaled-dot-product attention.

    Raises:
        ArgumentError: --shift_attn on an architecture whose attention cannot be replaced.
    """
    asks_for_fast, asks_for_shifted = (args.flash_attn, args.shift_attn) if args else (False, False)
    text = config.get_text_config()
    known = next((c for c in (config, text) if type(c) in MODEL_FOR_CAUSAL_LM_MAPPING), None)
    architecture = None if known is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(known)]
    has_sdpa = architecture is not None and bool(architecture._supports_sdpa)
    if asks_for_shifted:
        refuse_unshiftable(config, architecture)
        fastest = asks_for_fast and torch.cuda.is_available()
        kernel = "torch's fastest kernel" if fastest else "sdpa"
        logger.info(
            f"attention: shifted in training, groups of {args.shift_group_ratio:g} of a row; "
            f"full attention by {kernel} in evaluation and generation"
        )
        return register_shifted(args.shift_group_ratio, fastest)
    if asks_for_fast:
        name, why = fastest_exact(config, architecture, args)
    elif has_sdpa:
        return "sdpa"
    else:  # remote code: every model supports eager
        name, why = "eager", f"{config.model_type} has no scaled-dot-product attention"
        if architecture is None:
            return name
    logger.info(f"attention: {name} ({why})")
    return name


def refuse_unshiftable(config: PretrainedConfig, architecture: type[PreTrainedModel] | None) -> None:
    """Raises ArgumentError if --shift_attn would have no effect or be wrong."""
    text = config.get_text_config()
    reason = None
    kinds = {kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"}
    if architecture is None or not architecture._supports_attention_backend:
        reason = "its attention does not go through transformers' interface, which the shifted one needs"
    elif not architecture._supports_sdpa or getattr(text, "attn_logit_softcapping", None):
        reason = "its attention has terms of its own (sinks, or capped scores), which the shifted one has not"
    elif kinds or getattr(text, "sliding_window", None):
        reason = f"it has {', '.join(sorted(kinds)) or 'sliding windows'}, which see less than a row already"
    if reason:
        raise ArgumentError(f"--shift_attn: not for {config.model_type}: {reason}; leave it out")


def installed_flash_attention() -> list[int]:
    """The installed versions of FlashAttention that transformers can call."""
    tests = {2: is_flash_attn_2_available, 3: is_flash_attn_3_available, 4: is_flash_attn_4_available}
    return [version for version, is_available in tests.items() if is_available()]


def capability() -> tuple[int, int] | None:
    """The GPU's compute capability; None without a CUDA GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


# The versions that run on a GPU, faster first, by the first number of its compute capability.
FLASH_BY_GPU = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2,)}


def fastest_exact(
    config: PretrainedConfig, architecture: type[PreTrainedModel] | None, args: ModelArguments
) -> tuple[str, str]:
    """The attention that --flash_attn selects, and the reason."""
    if architecture is None:
        return "eager", "the model's own code brings its attention"
    own = "sdpa" if architecture._supports_sdpa else "eager"
    gpu = capability()
    if gpu is None:
        return own, "FlashAttention and its like run on CUDA GPUs, and there is none"
    installed = installed_flash_attention()
    fitting = [version for version in FLASH_BY_GPU.get(gpu[0], ()) if version in installed]
    dtype = config.get_text_config().dtype if args.torch_dtype == "auto" else args.torch_dtype
    in_16_bit = str(dtype).removeprefix("torch.") in ("float16", "bfloat16")
    if not architecture._supports_flash_attn:
        reason = f"{config.model_type} has no FlashAttention"
    elif not fitting:
        found = f"found {', '.join(map(str, installed))}" if installed else "not installed"
        reason = f"FlashAttention for this GPU: {found}"
    elif not in_16_bit:
        reason = "FlashAttention computes in 16 bit, the weights are in float32"
    else:
        return f"flash_attention_{fitting[0]}", f"FlashAttention {fitting[0]} is installed"
    text = config.get_text_config()
    replaceable = architecture._supports_attention_backend and architecture._supports_sdpa
    if not replaceable or getattr(text, "attn_logit_softcapping", None):
        return own, f"{reason}; {config.model_type} takes no other"
    order = "cuDNN's kernel first, then torch's flash kernel" if gpu >= HOPPER else "torch's flash kernel first"
    return FASTEST, f"{reason}; {order}, packed rows without a dense mask"


def attention_for_generation() -> AbstractContextManager[None]:
    """A context in which torch's attention does not use cuDNN.

    cuDNN plans anew for each cache length: 1.6 ms per layer and token on an H100 with torch 2.11, more than everything
    else per token of a small model.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def known_to_pack(config: PretrainedConfig) -> tuple[bool | None, str]:
    """The answer of `packs_exactly` from the config alone, with the reason; None if the model has to be probed."""
    text = config.get_text_config()
    rope = (rotations(text) or {}).get("rope_type", "default")
    if rope in ROW_DEPENDENT_ROPE:
        return False, f"{rope} position scaling depends on the row's length"
    if getattr(text, "attention_chunk_size", None):
        return False, "attention in chunks counts them from the row's start"
    if config.model_type in PACKS_EXACTLY:
        return True, f"{config.model_type} is a tested family"
    return None, f"{config.model_type} is not a tested family"


def rows_by_flags(
    config: PretrainedConfig, packing: bool, padded_because: str | None, shifted: bool
) -> tuple[bool | None, str]:
    """Whether rows will be packed, and the reason; None if that is not known before the weights load."""
    if not packing:
        return False, "--packing False"
    if padded_because:
        return False, padded_because
    return (False, SHIFTED) if shifted else known_to_pack(config)


def packs_exactly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Whether rows of several documents give the same logits as the documents alone.

    Conditions: position_ids restart at each document, use_cache=False, and no attention_mask (even one of ones leaks):
    only then does transformers build the block mask. Tested families are on a list; any other model is probed in eval
    mode, and its state is restored.

    Returns:
        (True or False, the reason for the log).
    """
    if is_shifted(model):
        return False, SHIFTED
    exact, reason = known_to_pack(model.config)
    if exact is not None:
        return exact, reason
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return False, f"{reason} and cannot be probed under ZeRO-3"
    try:
        difference = probe_packing(model, tokenizer)
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return False, f"{model.config.model_type} takes no position_ids"
    tolerance = PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE[torch.bfloat16])
    verdict = f"{model.config.model_type}: packed and alone differ by {difference:.1e} of the logits"
    return difference <= tolerance, f"{verdict} (tolerance {tolerance:.0e})"


@torch.no_grad()
def probe_packing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Root mean square of (packed - alone) relative to the logits, on three short documents of random tokens."""
    special = set(tokenizer.all_special_ids)
    vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special])
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    documents = [
        ordinary[torch.randint(len(ordinary), (1, length), generator=generator)].to(device) for length in PROBE_LENGTHS
    ]
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS])[None]
    was_training = model.training
    model.eval()
    try:
        packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits.float()
        alone = torch.cat([model(input_ids=d, use_cache=False).logits.float() for d in documents], dim=1)
    finally:
        model.train(was_training)
    centered = alone - alone.mean(dim=-1, keepdim=True)
    return float((packed - alone).square().mean().sqrt() / centered.square().mean().sqrt().clamp_min(1e-12))
