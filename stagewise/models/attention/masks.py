"""Attention masks that are described instead of built: for a row of 32,768 tokens the table has a billion entries.

transformers describes every mask as a function of index tensors; it is kept here together with the padding, and
evaluated only where needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

IndexFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Documents(NamedTuple):
    """The boundaries of the documents in packed rows, the rows one after another."""

    bounds: torch.Tensor  # (documents + 1,) int32: the first token of each, and the end
    lengths: list[int]


@dataclass(frozen=True, eq=False)
class LazyMask:
    """The mask of `batch` rows of `length` tokens that attend to themselves."""

    function: IndexFunction  # (batch, head, query, key) → bool, by broadcasting
    batch: int
    length: int
    device: torch.device | str
    padding: torch.Tensor | None = None  # (B, T): which tokens are not padding
    plain: bool = True  # only causality and padding

    def at(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether tokens `query` attend to tokens `key` of the same row: indices that broadcast to S → (B, *S)."""
        batch = torch.arange(self.batch, device=self.device).view(-1, *[1] * query.dim())
        seen = self.function(batch, torch.zeros_like(batch), query[None], key[None])
        if self.padding is not None:
            seen = seen & self.padding[batch, key[None]]
        return seen.expand(self.batch, *torch.broadcast_shapes(query.shape, key.shape))

    @cached_property
    def dense(self) -> torch.Tensor:
        """The full table, (B, 1, T, T)."""
        return sdpa_mask(
            self.batch,
            self.length,
            self.length,
            mask_function=self.function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            device=self.device,
        )

    @cached_property
    def hidden_by_causality(self) -> bool:
        """Whether a plain causal mask changes nothing for non-padding tokens: padding is on the right."""
        if not self.plain:
            return False
        return self.padding is None or bool((self.padding[:, 1:] <= self.padding[:, :-1]).all())

    @cached_property
    def documents(self) -> Documents | None:
        """The documents of packed rows; None if the mask is of another kind."""
        if self.padding is not None:
            return None
        here = torch.arange(1, self.length, device=self.device)
        if bool(self.at(here - 1, here).any()):  # some token attends to later ones
            return None
        first = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        first[:, 1:] = ~self.at(here, here - 1)
        starts = first.flatten().nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([first.numel()])])
        return Documents(bounds.to(torch.int32), bounds.diff().tolist())


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: IndexFunction = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> LazyMask | torch.Tensor | None:
    """A mask for transformers' AttentionMaskInterface.

    Returns:
        None for plain causality, a LazyMask for rows that attend to themselves, else the mask of `sdpa` (for a cache,
        windows, and masks that only vmap can evaluate).
    """
    to_itself = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if not to_itself or local_size is not None or use_vmap:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    if allow_is_causal_skip and (attention_mask is None or bool(attention_mask.all())):
        return None
    return LazyMask(mask_function, batch_size, q_length, device, attention_mask, plain=allow_is_causal_skip)
