"""Exact attention of torch with the GPU's fastest kernel, and packed rows without a mask table.

Registered with transformers as `torch_fastest`. On Hopper and later GPUs cuDNN's kernel takes precedence over torch's
flash kernel; a packed row runs document by document in one varlen kernel.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from stagewise.models.attention.masks import Documents, LazyMask, describe_mask

FASTEST = "torch_fastest"
# torch prefers its flash kernel, which runs at half of cuDNN's speed on an H100
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HOPPER = (9, 0)  # compute capability from which cuDNN's kernel is faster


def causal_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal or masked attention with the fastest kernel.

    Args:
        query: (B, H, T, D).
        key, value: (B, H or a divisor of it, T, D).
        mask: True where a key is attended to, broadcast to (B, H, T, T); None: causal.

    Returns:
        (B, H, T, D).
    """
    each = query.shape[1] // key.shape[1]
    in_16_bit = query.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(query.device.type)
    if each > 1 and (mask is not None or (query.is_cuda and not in_16_bit)):
        # kernels with a mask or in float32 take no grouped key heads: torch would build the full score matrix
        key, value, each = repeat_kv(key, each), repeat_kv(value, each), 1
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": mask is None, "scale": scaling}
    options["enable_gqa"] = each > 1
    if query.is_cuda and torch.cuda.get_device_capability(query.device) >= HOPPER:
        with sdpa_kernel(ORDER, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query, key, value, **options)


def fastest_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' AttentionInterface: (B, H, T, D) → (B, T, H, D)."""
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    if isinstance(attention_mask, LazyMask):
        documents = None if special or not causal else attention_mask.documents
        if documents is not None:
            return document_attention(query, key, value, documents, scaling, dropout).transpose(1, 2), None
        attention_mask = (
            None if attention_mask.hidden_by_causality and causal else attention_mask.dense.to(query.device)
        )
    if special or not causal or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    return causal_sdpa(query, key, value, attention_mask, scaling, dropout).transpose(1, 2).contiguous(), None


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention within each document of packed rows: (B, H, T, D) → (B, H, T, D).

    One kernel for all documents if there is one (a GPU, 16 bit, no dropout); otherwise one call per document.
    """
    batch, _, length, _ = query.shape
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # (B · T, H, D)
    if has_varlen_kernel(query, value, scaling, dropout):
        mixed = varlen(*rows, documents, scaling)
    else:
        parts = zip(*(row.split(documents.lengths) for row in rows), strict=True)
        mixed = torch.cat(
            [
                causal_sdpa(*(part.transpose(0, 1)[None] for part in three), None, scaling, dropout)[0].transpose(0, 1)
                for three in parts
            ]
        )
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)


@cache
def varlen_options() -> frozenset[str]:
    """The options of torch's varlen kernel; empty if torch has none (before 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def has_varlen_kernel(query: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float) -> bool:
    """Whether the varlen kernel supports these tensors: on GPUs, in 16 bit, without dropout."""
    size = query.shape[-1]
    own_scale = scaling is None or abs(scaling * size**0.5 - 1) < 1e-6
    return (
        query.is_cuda
        and dropout == 0
        and query.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and size == value.shape[-1] <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and bool(varlen_options())
        and (own_scale or "scale" in varlen_options())
    )


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float | None
) -> torch.Tensor:
    """All documents in one kernel: (tokens, H, D) → (tokens, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    known, longest = varlen_options(), max(documents.lengths)
    # torch 2.10 has is_causal; from 2.11 on, a window that ends at the query means the same
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scaling
    each = query.shape[1] // key.shape[1]
    if each > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif each > 1:
        key, value = key.repeat_interleave(each, dim=1), value.repeat_interleave(each, dim=1)
    bounds = documents.bounds.to(query.device)
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), bounds, bounds, longest, longest, **options
    )


AttentionInterface.register(FASTEST, fastest_attention)
AttentionMaskInterface.register(FASTEST, describe_mask)
