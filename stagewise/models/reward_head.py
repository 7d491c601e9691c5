"""The scalar head of a reward model: its config, and the head in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from stagewise.errors import ModelError


class Float32Linear(nn.Linear):
    """A scalar head in float32 on a 16-bit model: its updates are too small for 16 bit."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) in any precision → (…, labels)."""
        return super().forward(hidden.to(self.weight.dtype))


def reward_config(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> PretrainedConfig:
    """The config of a reward model on this base: one label, and the pad id that determines where a row ends.

    Raises:
        ModelError: for an architecture without a sequence-classification class.
    """
    text = config.get_text_config()
    # the scalar head of a multimodal family is on its text model
    known = next((c for c in (config, text) if type(c) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING), None)
    if known is None:
        raise ModelError(
            f"--model_name_or_path {name}: transformers has no sequence-classification class for "
            f"{config.model_type!r}, so it cannot be a reward model; use another family, e.g. llama"
        )
    known.num_labels, known.pad_token_id = 1, tokenizer.pad_token_id
    known.get_text_config().pad_token_id = tokenizer.pad_token_id
    return known


def whole_weights(module: nn.Module) -> AbstractContextManager:
    """A context in which a module partitioned by ZeRO-3 has its full weights; otherwise it does nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))
