"""Prompt tuning, P-tuning and prefix tuning: trained virtual tokens before the text; the base's weights do not change.

prompt_tuning   v v v t t t      embeddings, trained directly           Lester et al. 2021
p_tuning        v v v t t t      embeddings, trained through an encoder Liu et al. 2021
prefix_tuning   each layer's keys and values of v v v                   Li and Liang 2021
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel, TrainerCallback

from stagewise.config.arguments import AdapterArguments
from stagewise.errors import AdapterError

STATE = "prompt_encoder.pt"  # in a checkpoint: the encoder, of which the adapter only keeps the output


def virtual_config(model: PreTrainedModel, args: AdapterArguments, task_type: str) -> PeftConfig:
    """PEFT's config of a method with virtual tokens."""
    common = {"task_type": task_type, "num_virtual_tokens": args.num_virtual_tokens}
    if args.method == "prompt_tuning":
        return PromptTuningConfig(**common)
    width = args.encoder_hidden_size or model.config.get_text_config().hidden_size
    if args.method == "p_tuning":
        return PromptEncoderConfig(**common, encoder_hidden_size=width)
    shape = {"encoder_hidden_size": width} if args.prefix_projection else {}
    text = model.config.get_text_config()
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        # Falcon has one key and value head for all heads, which PEFT does not read from its config.
        shape |= {"num_attention_heads": 1, "token_dim": text.hidden_size // text.num_attention_heads}
    return PrefixTuningConfig(**common, prefix_projection=args.prefix_projection, **shape)


def attach_virtual_tokens(model: PreTrainedModel, args: AdapterArguments, task_type: str) -> PeftModel:
    """Adds new virtual tokens to a model.

    Raises:
        AdapterError: for an architecture that does not support them.
    """
    name = type(model).__name__
    try:
        wrapped = get_peft_model(model, virtual_config(model, args, task_type))
        effect = probe(wrapped)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise AdapterError(
            f"--fine_tuning_type {args.method}: {name} cannot take it ({error}); train with --fine_tuning_type lora"
        ) from error
    if not effect > 0:
        raise AdapterError(
            f"--fine_tuning_type {args.method}: {name} does not read tokens before the text; train with "
            "--fine_tuning_type lora"
        )
    return wrapped


@torch.no_grad()
def probe(wrapped: PeftModel) -> float:
    """How far the virtual tokens move the logits of two tokens, run as in training.

    Infinite for a model without weights, which cannot be probed.
    """
    ids = torch.tensor([[0, 1]], device=wrapped.get_input_embeddings().weight.device)
    if ids.is_meta:
        return float("inf")
    was_training = wrapped.training
    wrapped.eval()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    found = wrapped(**inputs).logits[:, -2:]
    with wrapped.disable_adapter():
        without = wrapped(**inputs).logits
    wrapped.train(was_training)
    return float((found - without).abs().max())


def train_directly(wrapped: PeftModel) -> PeftModel:
    """--peft_path: trains the virtual tokens directly; the encoder that produced them is not part of an adapter."""
    encoder = wrapped.prompt_encoder[wrapped.active_adapter]
    encoder.embedding.weight.requires_grad_(True)
    return wrapped.train()


class EncoderState(TrainerCallback):
    """Saves the encoder of virtual tokens in checkpoints, so that a resumed run continues with it."""

    def __init__(self, wrapped: PeftModel):
        self.encoder = wrapped.prompt_encoder[wrapped.active_adapter]
        if len(list(self.encoder.children())) > 1:
            # PEFT would load the encoder's output as its input, which has another shape or meaning.
            self.encoder._load_adapter_state_dict = lambda state: None

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            torch.save(self.encoder.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._restore(args.resume_from_checkpoint)  # the run has created the checkpoint's folder

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            self._restore(state.best_model_checkpoint)

    def _restore(self, folder: str | Path | None) -> None:
        if folder is not None and (Path(folder) / STATE).is_file():
            saved = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
            self.encoder.load_state_dict(saved)
