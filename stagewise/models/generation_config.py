"""A model's generation_config: where its answers end."""

from __future__ import annotations

from collections.abc import Sequence

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stagewise.errors import ModelError


def finish_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str | Sequence[str] | None
) -> None:
    """Makes the model's generation_config end at the template's end marker, in place, so that it can be saved.

    Args:
        model: a model, with or without an adapter.
        tokenizer: provides the end and pad ids; they may be equal.
        stop: the template's end marker, or all of them; None: only the tokenizer's end token.

    Raises:
        ModelError: if there is no end token at all.
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
        # Published configs combine sampling values with greedy search, which save_pretrained refuses.
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)
    config.validate(strict=True)
