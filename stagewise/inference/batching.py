"""Inputs of `generate` for prompts of several lengths: rows padded on the left, with virtual tokens before the text.

. . v v p p p | a a          prompt and P-tuning: embeddings right before the prompt
v v . . p p p | a a          prefix tuning: keys and values, at the beginning of the cache
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from stagewise.inference.decoding import ForcedToken
from stagewise.inference.sampling import left_padded
from stagewise.models.attention.choose import PROBE_TOLERANCE


def has_virtual_tokens(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model's adapter consists of virtual tokens: prompt, P- or prefix tuning."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def prompt_inputs(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], *, adapter: bool = True
) -> dict[str, Any]:
    """Arguments of the base's generate: input_ids or inputs_embeds, attention_mask (B, T), for prefixes
    past_key_values.

    Args:
        model: a causal language model, with or without an adapter; its generation_config has the pad token.
        prompts: token ids.
        adapter: False leaves out virtual tokens.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device, pad = base.get_input_embeddings().weight.device, base.generation_config.pad_token_id
    if not (adapter and has_virtual_tokens(model)):
        ids, mask = left_padded(prompts, pad)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    config = model.active_peft_config
    count = config.num_virtual_tokens
    if config.peft_type.value == "PREFIX_TUNING":
        # these ids stand for the virtual tokens, which are already in the cache: they are never read
        ids, mask = left_padded(prompts, pad)
        front = torch.full((len(ids), count), pad)
        ids, mask = torch.cat([front, ids], dim=1), torch.cat([torch.ones_like(front), mask], dim=1)
        cache = model.get_prompt(len(ids), max_cache_len=-1)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "past_key_values": cache}
    ids, mask = left_padded([[pad] * count + list(prompt) for prompt in prompts], pad)
    embeds = model.word_embeddings(ids.to(device))
    virtual = model.get_prompt(1)[0].to(embeds)
    for row, prompt in enumerate(prompts):
        start = ids.shape[1] - count - len(prompt)
        embeds[row, start : start + count] = virtual
    return {"inputs_embeds": embeds, "attention_mask": mask.to(device)}


@torch.no_grad()
def padding_is_unread(model: PreTrainedModel | PeftModel) -> bool:
    """Whether left padding does not change a row's logits; two forward passes of a few tokens."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    vocabulary = base.config.get_text_config().vocab_size
    ids = (torch.arange(12) * 7919 % min(vocabulary, 50_000)).tolist()
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "stop_strings": None}

    def logits(prompts: list[list[int]]) -> torch.Tensor:
        out = base.generate(
            **prompt_inputs(model, prompts),
            **options,
            logits_processor=[ForcedToken(ids[3])],
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)[:, 0].float()

    alone, padded = logits([ids[:5]]), logits([ids[:5], ids])
    error = (alone - padded).square().mean().sqrt() / alone.square().mean().sqrt()
    return bool(error < PROBE_TOLERANCE.get(base.dtype, PROBE_TOLERANCE[torch.bfloat16]))
