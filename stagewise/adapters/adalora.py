"""AdaLoRA: each matrix starts with --init_r ranks, and the least important ones are removed step by step.

    steps    1 … tinit | … decreasing, chosen anew every deltaT … | last tfinal
    ranks    init_r    | cubic schedule                           | target_r on average

A removed rank is zero, and may come back until the last choice, so checkpoints hold all ranks; only the finished
adapter is reduced to the remaining ones. Paper: https://arxiv.org/abs/2303.10512
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from loguru import logger
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.adalora import AdaLoraConfig
from transformers import PreTrainedModel, Trainer, TrainerCallback

from stagewise.adapters.compatibility import check_schedule
from stagewise.config.arguments import AdapterArguments

STATE = "rank_importance.pt"  # in a checkpoint: the running averages from which ranks are chosen
LONG = 2**62  # steps; PEFT requires a number before the Trainer knows it


def schedule_config(args: AdapterArguments, **common) -> AdaLoraConfig:
    """PEFT's config; the number of steps is set when training begins."""
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    return AdaLoraConfig(**common, **{name: getattr(args, name) for name in names}, total_step=LONG)


def attach_ranks(base: PreTrainedModel, config: AdaLoraConfig) -> PeftModel:
    """Wraps the base in a new AdaLoRA adapter.

    PEFT divides by a number per matrix, `ranknum`, that is never saved. If the base is on a GPU or in 16 bit, PEFT
    moves or casts that number and thereby makes it trainable (PEFT 0.21.2): the saved adapter would be another model.
    """
    wrapped = get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return wrapped


def load_with_all_ranks(base: PreTrainedModel, folder: str | Path, config: AdaLoraConfig) -> PeftModel:
    """Loads an adapter to continue from: its ranks keep their positions among the initial ranks; the others are zero.

    Raises:
        RuntimeError: if its shapes do not match the base.
    """
    weights, kept = load_peft_weights(str(folder), device="cpu"), config.rank_pattern
    for name, left in (kept or {}).items():
        prefix, places = f"base_model.model.{name}".split(".lora_E")[0], torch.tensor(left).bool()
        for part, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            small = weights[f"{prefix}.{part}"]
            shape = [len(places) if d == dim else n for d, n in enumerate(small.shape)]
            weights[f"{prefix}.{part}"] = torch.zeros(shape, dtype=small.dtype).index_copy(
                dim, places.nonzero().squeeze(1), small
            )
    config.rank_pattern, config.inference_mode = None, False
    wrapped = attach_ranks(base, config)
    set_peft_model_state_dict(wrapped, weights)
    return wrapped


def ranks_left(wrapped: PeftModel) -> dict[str, list[bool]]:
    """The non-zero ranks of each matrix, as PEFT's `rank_pattern`."""
    named = wrapped.base_model.model.named_parameters()
    return {name: (p != 0).view(-1).tolist() for name, p in named if ".lora_E." in name}


class AdaptiveRanks(TrainerCallback):
    """Runs AdaLoRA's schedule at every optimizer step, and adds its orthogonality term to the gradients.

    An adapter of --peft_path keeps its ranks.
    """

    def __init__(self, trainer: Trainer, wrapped: PeftModel, adapter: AdapterArguments):
        self.trainer, self.wrapped, self.adapter = trainer, wrapped, adapter
        self.config = wrapped.peft_config[wrapped.active_adapter]
        self.allocator = wrapped.base_model.rankallocator
        self.kept = ranks_left(wrapped) if adapter.peft_path else None
        # PEFT prunes what it saves by this, also in checkpoints; it is set at the end.
        self.config.rank_pattern = None

    def on_train_begin(self, args, state, control, **kwargs):
        check_schedule(self.adapter, state.max_steps)
        if not self.adapter.peft_path:
            self.config.total_step = state.max_steps
        folder = args.resume_from_checkpoint if state.global_step else None  # set by the run
        if folder is not None and (Path(folder) / STATE).is_file():
            saved = torch.load(Path(folder) / STATE, map_location=args.device, weights_only=True)
            self.kept = saved.pop("kept")
            for name, averages in saved.items():
                setattr(self.allocator, name, averages)

    def on_step_begin(self, args, state, control, **kwargs):
        """Adds the gradient of the orthogonality term, before those of the batches."""
        if self.config.orth_reg_weight:
            scaler = getattr(self.trainer.accelerator, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            add_orthogonality(self.wrapped, self.config.orth_reg_weight * scale)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Runs after the weights were updated, while their gradients are still there."""
        step = state.global_step + 1
        if self.trainer.guard.is_skipped():  # the gradients, from which ranks are chosen, are not finite
            return
        if self.adapter.peft_path or step > self.config.total_step - self.config.tfinal:
            if self.kept:
                self.allocator.mask_using_rank_pattern(self.wrapped.base_model.model, self.kept)
            return
        self.wrapped.base_model.update_and_allocate(step)
        self.kept, self.config.rank_pattern = self.config.rank_pattern or self.kept, None

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            names = ("ipt", "exp_avg_ipt", "exp_avg_unc")
            averages = {name: getattr(self.allocator, name) for name in names}
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save({**averages, "kept": self.kept}, folder / STATE)

    def on_train_end(self, args, state, control, **kwargs):
        if self.kept is None:  # the run ended before the first choice
            return
        self.config.rank_pattern = left = ranks_left(self.wrapped)
        # A matrix without any rank is a result, not a lost weight.
        warnings.filterwarnings("ignore", message="Adapter .* LoRA tensor.* have invalid shape")
        ranks = [sum(pattern) for pattern in left.values()]
        logger.info(
            f"AdaLoRA: {sum(ranks)} of {len(ranks) * self.config.init_r} ranks are left, {min(ranks)} to "
            f"{max(ranks)} a matrix, {sum(ranks) / len(ranks):.2f} on average"
        )


def add_orthogonality(wrapped: PeftModel, weight: float) -> torch.Tensor:
    """Adds the gradient of `weight` times the mean of |P Pᵀ - 1| over all P = A and Bᵀ; returns the term."""
    matrices = [
        (p, p if ".lora_A." in name else p.T)
        for name, p in wrapped.named_parameters()
        if p.requires_grad and (".lora_A." in name or ".lora_B." in name)
    ]
    with torch.enable_grad():
        distances = [
            torch.linalg.norm(m @ m.T - torch.eye(len(m), device=m.device, dtype=m.dtype)) for _, m in matrices
        ]
        term = weight * torch.stack(distances).mean()
        gradients = torch.autograd.grad(term, [p for p, _ in matrices])
    for (parameter, _), gradient in zip(matrices, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return term.detach()
