"""Sampling of answers from a causal language model, each row with its own random numbers.

A row's answer depends only on its prompt and its random numbers: not on the rest of the batch, its padding, or the
number of processes.

    prompts      . . p p p | a a a a e          padded on the left, so that all answers start at the same column
                 p p p p p | b e                a finished row leaves the batch once enough have finished
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from stagewise.adapters.attach import add_delta, lora_delta
from stagewise.errors import GenerationError
from stagewise.models.attention.choose import attention_for_generation
from stagewise.models.forward import base_of

# Rows are dropped when at most this share of the batch is unfinished: dropping copies the whole cache once.
STILL_SPEAKING = 0.8
# The purposes of PPO's random numbers: the number after the seed in their key.
EVALUATION, ROLLOUT, PROMPTS, UPDATES = range(4)


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled, and where an answer ends."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0


def random_numbers(keys: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), one row per key, one column per token: (B, length).

    A row depends only on its key (seed, rollout, prompt …).
    """
    rows = [np.random.default_rng(list(key)).random(length, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The sampling distribution: (B, V) -> (B, V), rows summing to 1, 0 for tokens excluded by top-k and top-p.

    top-p keeps the fewest tokens whose probabilities reach it (Holtzman et al. 2020).
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    shares = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(dim=-1, descending=True)
        enough_before = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        shares = shares.masked_fill(enough_before.gather(-1, order.argsort(dim=-1)), 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares


def sample_token(shares: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative sum of a row's probabilities exceeds its number: (B, V), (B,) -> (B,)."""
    running = shares.cumsum(dim=-1)
    total = running[:, -1:]
    # A number times the total may round up to the total itself, which no cumulative sum exceeds.
    wanted = torch.minimum(numbers.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, wanted, right=True).squeeze(1)


@contextmanager
def adapters_folded(model: nn.Module) -> Iterator[None]:
    """Folds LoRA and AdaLoRA into the weights within the context, so that a token costs no more than with the base
    alone.

    Weights and adapters are restored afterwards, as the same objects. If the copies would take more than half of the
    free memory, or a layer cannot be folded (quantized weights, DoRA, experts in one parameter), nothing is folded and
    only LoRA's float32 matrices are cast to the precision of their layers, which saves two casts per layer and token.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    folds = all(map(_folds, layers)) and _fits([layer.get_base_layer().weight for layer in layers])
    new = [_folded(layer) for layer in layers] if folds else [pair for layer in layers for pair in _lowered(layer)]
    kept = [(module, module.weight) for module, _ in new]
    try:
        for module, weight in new:
            module.weight = nn.Parameter(weight, requires_grad=False)
        for layer in layers if folds else []:
            layer.enable_adapters(False)
        yield
    finally:
        for module, weight in kept:
            module.weight = weight
        for layer in layers if folds else []:
            layer.enable_adapters(True)


def _folds(layer: LoraLayer) -> bool:
    """Whether the layer is a plain linear one with active, plain LoRA adapters."""
    base, names = layer.get_base_layer(), layer.active_adapters
    plain = isinstance(base, nn.Linear) and base.weight.dtype.is_floating_point
    switched_on = not (layer.disable_adapters or layer.merged) and all(name in layer.lora_A for name in names)
    return plain and switched_on and not any(layer.use_dora.get(name) or layer.lora_bias.get(name) for name in names)


def _fits(weights: Sequence[torch.Tensor]) -> bool:
    """Whether copies of the weights take at most half of the free memory of their device."""
    if not weights:
        return False
    device, needed = weights[0].device, sum(weight.nbytes for weight in weights)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 2 * needed <= torch.cuda.mem_get_info(device)[0] + unused
    return 2 * needed <= psutil.virtual_memory().available


@torch.no_grad()
def _folded(layer: LoraLayer) -> tuple[nn.Linear, torch.Tensor]:
    """The linear layer under the adapters, and its weight with them folded in."""
    base = layer.get_base_layer()
    return base, add_delta(base.weight, lora_delta(layer))


@torch.no_grad()
def _lowered(layer: LoraLayer) -> list[tuple[nn.Linear, torch.Tensor]]:
    """Adapter matrices whose precision differs from their layer's, and their weights in that precision."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or not base.weight.dtype.is_floating_point:
        return []
    if isinstance(layer, AdaLoraLayer) or any(layer.use_dora.values()):  # their other parts stay in float32
        return []
    matrices = [matrix for part in (layer.lora_A, layer.lora_B) for matrix in part.values()]
    dtype = base.weight.dtype
    return [(matrix, matrix.weight.to(dtype)) for matrix in matrices if matrix.weight.dtype != dtype]


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as input_ids and attention_mask of shape (B, T), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], numbers: torch.Tensor, sampling: Sampling
) -> list[list[int]]:
    """Samples an answer to each prompt.

    Args:
        model: a causal language model in eval mode, with or without an adapter.
        prompts: token ids, at least one each.
        numbers: (B, N), the random number of each token of each row; N is the maximum length of an answer.
        sampling: how tokens are sampled; an answer ends with the first of `stop_ids`, which is part of it.

    Returns:
        B answers of 1 to N token ids.

    Raises:
        GenerationError: for an architecture without a key-value cache.
    """
    base = base_of(model)
    accepted = inspect.signature(base.forward).parameters
    device = base.get_input_embeddings().weight.device
    numbers = numbers.to(device)
    ids, mask = (tensor.to(device) for tensor in left_padded(prompts, sampling.pad_id))
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the answers that the batch's rows belong to
    speaking = set(rows)
    cache = None
    for step in range(numbers.shape[1]):
        features = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in accepted:
            features["position_ids"] = positions
        if "logits_to_keep" in accepted:
            # As a tensor: with an int, slicing gives strides for which the product with the head copies the head per
            # row.
            features["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=device)
        with attention_for_generation():
            output = model(**features)
        cache = output.get("past_key_values")
        if cache is None:
            raise GenerationError(f"{type(base).__name__} keeps no keys and values: it cannot be sampled from")
        tokens = sample_token(probabilities(output.logits[:, -1], sampling), numbers[rows, step])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in speaking:
                answers[row].append(token)
                if token in sampling.stop_ids:
                    speaking.remove(row)
        if not speaking:
            break
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(speaking) <= STILL_SPEAKING * len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in speaking], device=device)
            cache.reorder_cache(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = [row for row in rows if row in speaking]
    return answers


def repetition(answer: Sequence[int]) -> float:
    """Share of an answer's 4-grams that occurred in it before; 0 for fewer than four tokens."""
    grams = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
