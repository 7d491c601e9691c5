"""Shifted sparse attention (S²-Attn) of LongLoRA: https://arxiv.org/abs/2309.12307, in training only.

A row is split into groups of a share of its length, by default a quarter, and a token attends to earlier tokens of its
own group. For the second half of the heads the groups start half a group later, so tokens separated in one half are
together in the other. A row of 16 tokens, groups of 4:

first half of the heads    0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15
second half                0 1 | 2 3 4 5 | 6 7 8 9 | 10 11 12 13 | 14 15

The paper's first code shifts by rolling the row, which joins its last half group and its first one, so the first
tokens attend to the last ones: the future. The paper names that leak and says to mask it; its later code splits there,
and so does this: the first and the last half group stay separate.

Evaluation and generation use full attention, like the finished model.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from stagewise.models.attention.masks import LazyMask, describe_mask
from stagewise.models.attention.sdpa import causal_sdpa, fastest_attention

PREFIX = "shifted_"


def register_shifted(ratio: float, fastest: bool = False) -> str:
    """Registers shifted attention with transformers; returns its name for `attn_implementation`.

    Args:
        ratio: a group's share of the row.
        fastest: evaluation and generation use `torch_fastest` instead of plain `sdpa`.
    """
    name = f"{PREFIX}{ratio:g}{'_fastest' if fastest else ''}"
    AttentionInterface.register(name, partial(shifted_attention, ratio=ratio, fastest=fastest))
    AttentionMaskInterface.register(name, describe_mask)
    return name


def is_shifted(model: nn.Module) -> bool:
    """Whether a model trains with shifted attention."""
    return str(model.config.get_text_config()._attn_implementation).startswith(PREFIX)


def longlora_modules(model: PreTrainedModel) -> list[str]:
    """What LongLoRA trains fully beside the adapter: embedding and norms, by the last part of their names."""
    embedding = model.get_input_embeddings()
    kinds = (nn.LayerNorm, nn.RMSNorm)
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if module is embedding or isinstance(module, kinds) or type(module).__name__.endswith("Norm")
        }
    )


def shifted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    ratio: float,
    fastest: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' AttentionInterface: (B, H, T, D) → (B, T, H, D).

    Full attention outside training, and with a cache.
    """
    if not module.training or query.shape[2] != key.shape[2]:
        if not fastest and isinstance(attention_mask, LazyMask):
            attention_mask = attention_mask.dense.to(query.device)
        exact = fastest_attention if fastest else sdpa_attention_forward
        return exact(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if torch.is_tensor(attention_mask):
        raise ValueError("shifted attention has no form for this mask (a window, or one made by the caller)")
    heads, length = query.shape[1:3]
    size = math.ceil(length * ratio)
    mixed = []
    for first, last, shift in ((0, heads // 2, 0), (heads // 2, heads, size // 2)):
        if last > first:
            keys, values = (heads_of(tensor, first, last, heads) for tensor in (key, value))
            half = query[:, first:last]
            mixed.append(group_attention(half, keys, values, attention_mask, size, shift, scaling, dropout))
    return torch.cat(mixed, dim=1).transpose(1, 2).contiguous(), None


def heads_of(tensor: torch.Tensor, first: int, last: int, heads: int) -> torch.Tensor:
    """The key or value heads of query heads `first` to `last` of `heads`: (B, K, T, D) → (B, k, T, D).

    Query head h reads key head h // (H / K). A key head that both halves read is repeated for each.
    """
    each = heads // tensor.shape[1]
    if first % each == 0 and last % each == 0:
        return tensor[:, first // each : last // each]
    return repeat_kv(tensor, each)[:, first:last]


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: LazyMask | None,
    size: int,
    shift: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention within groups of `size` tokens: (B, h, T, D) → (B, h, T, D).

    Groups start at 0, shift, shift + size, …; each is padded at its end, where causality hides the padding.
    """
    batch, _, length, _ = query.shape
    tokens = group_tokens(length, size, shift, query.device)  # (groups, size)
    groups, filled = len(tokens), tokens.clamp_min(0).flatten()

    def cut(tensor: torch.Tensor) -> torch.Tensor:  # (B, h, T, D) → (B · groups, h, size, D)
        return tensor.index_select(2, filled).unflatten(2, (groups, size)).transpose(1, 2).flatten(0, 1)

    seen = None
    if mask is not None and not mask.hidden_by_causality:
        place = tokens.clamp_min(0).to(mask.device)  # the embedding's device under --device_map
        seen = mask.at(place[:, :, None], place[:, None, :]).to(query.device) & (tokens >= 0)[None, :, None, :]
        # A softmax over nothing is NaN; padding attends to itself, and its output is not used.
        seen = (seen | torch.eye(size, dtype=torch.bool, device=seen.device)).flatten(0, 1)[:, None]
    mixed = causal_sdpa(cut(query), cut(key), cut(value), seen, scaling, dropout)
    mixed = mixed.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3)
    here = torch.arange(length, device=query.device)
    return mixed.index_select(2, torch.where(here < shift, here, here + size - shift) if shift else here)


def group_tokens(length: int, size: int, shift: int, device: torch.device | str) -> torch.Tensor:
    """The tokens of each group, (groups, size), -1 for padding."""
    starts = [*([0] if shift else []), *range(shift, length, size)]
    ends = torch.tensor([*starts[1:], length], device=device)[:, None]
    tokens = torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)
    return torch.where(tokens < ends, tokens, -1)
