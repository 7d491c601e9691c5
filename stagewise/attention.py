"""Which attention runs, and whether packed documents stay apart in it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from loguru import logger
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Families for which packed = alone was measured, with use_cache=False and no attention_mask (tests/test_attention.py).
PACKS_EXACTLY = frozenset(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"))
# Their inverse frequencies follow the longest position in the row, so a document alone sees other ones.
ROW_DEPENDENT_ROPE = ("dynamic", "longrope")
PROBE_LENGTHS = (5, 9, 7)
# Root mean square of (packed - alone) over that of the logits: rounding stays below, a leak is 0.1 and more.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def choose_attention(config: PretrainedConfig) -> str:
    """Returns "sdpa", or "eager" for an architecture that has no scaled-dot-product attention."""
    text = config.get_text_config()
    known = next((c for c in (config, text) if type(c) in MODEL_FOR_CAUSAL_LM_MAPPING), None)
    if known is None:  # remote code: eager is what every model has
        return "eager"
    if MODEL_FOR_CAUSAL_LM_MAPPING[type(known)]._supports_sdpa:
        return "sdpa"
    logger.info(f"attention: eager ({config.model_type} has no scaled-dot-product attention)")
    return "eager"


def attention_for_generation() -> AbstractContextManager[None]:
    """A context in which torch's attention does without cuDNN's.

    cuDNN plans anew for each length that the cache reaches: 1.6 ms a layer and token on an H100 with torch 2.11, more
    than all else that a token of a small model costs.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def known_to_pack(config: PretrainedConfig) -> tuple[bool | None, str]:
    """What `packs_exactly` says by the config alone, and why; None where a probe of the model has to find out."""
    text = config.get_text_config()
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ROW_DEPENDENT_ROPE:
        return False, f"{rope} position scaling depends on the row's length"
    if getattr(text, "attention_chunk_size", None):
        return False, "attention in chunks counts them from the row's start"
    if config.model_type in PACKS_EXACTLY:
        return True, f"{config.model_type} is a tested family"
    return None, f"{config.model_type} is not a tested family"


def packs_exactly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Says whether rows of several documents give the logits that the documents give alone.

    Conditions: position_ids restart at each document, use_cache=False, and no attention_mask (an all-ones mask leaks
    too): transformers builds the block mask only then. Families that were tested are on a list; any other model is
    probed on the spot, in eval mode, whose state is put back.

    Returns:
        (True or False, the reason in words for the log).
    """
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
    """Root mean square of packed - alone logits over that of the logits, on three short documents of random tokens."""
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
    centred = alone - alone.mean(dim=-1, keepdim=True)
    return float((packed - alone).square().mean().sqrt() / centred.square().mean().sqrt().clamp_min(1e-12))
