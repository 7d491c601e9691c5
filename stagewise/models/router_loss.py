"""The auxiliary loss of the routers in a mixture of experts (--router_aux_loss), which balances the experts' load.

Over all tokens and layers of a forward pass, for E experts of which each token is sent to k:

    E · Σ over experts of (share of tokens sent to it) · (mean probability of the expert)

It is k if every expert gets its share, and more if some get most of the tokens (Fedus et al. 2021, equations 4 to 6;
https://arxiv.org/abs/2101.03961). Padding is left out. transformers computes it; it is added to the stage's loss here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from loguru import logger
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stagewise.config.arguments import ModelArguments
from stagewise.errors import ArgumentError
from stagewise.models.forward import base_of


def check_router(args: ModelArguments, config: PretrainedConfig) -> None:
    """Raises ArgumentError if --router_aux_loss has no effect on the architecture, or its weight would be zero."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not args.router_aux_loss or known is None:  # a repository's own code: known once the model is loaded
        return
    kinds = known if isinstance(known, (list, tuple)) else [known]
    if not any(gives_router_loss(kind) for kind in kinds):
        raise ArgumentError(
            f"--router_aux_loss: {config.model_type!r} has no routers' loss, which mixtures of experts have (mixtral, "
            "qwen3_moe …); leave it out"
        )


def gives_router_loss(kind: type) -> bool:
    """Whether a class of causal language models can compute the router loss."""
    return "output_router_logits" in inspect.signature(kind.forward).parameters


class RouterLoss:
    """Requests the router loss in each forward pass of training, and holds it until the stage takes it.

    Evaluation, sampling and passes without gradients are not affected.

    Args:
        model: with its adapter, before DDP or DeepSpeed wraps it.
        weight: its factor in the stage's loss.
    """

    def __init__(self, model: nn.Module, weight: float):
        self.weight = weight
        base = base_of(model)
        self.architecture = type(base).__name__
        self.found: torch.Tensor | None = None  # of the latest forward pass
        self.seen = torch.zeros(2)  # sum and count since the last log
        model.register_forward_pre_hook(self._ask, with_kwargs=True)
        model.register_forward_hook(self._see)

    def _ask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        asked = module.training and torch.is_grad_enabled()
        return args, {**kwargs, "output_router_logits": True} if asked else kwargs

    def _see(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.found = getattr(output, "aux_loss", None)

    def take(self) -> torch.Tensor:
        """The loss of the last forward pass times the weight: a scalar with gradient."""
        found, self.found = self.found, None
        if not torch.is_tensor(found):
            raise ArgumentError(
                f"--router_aux_loss: {self.architecture} of transformers {transformers.__version__} computes no "
                "router loss in its forward pass; leave it out, or try a newer transformers"
            )
        self.seen = self.seen.to(found.device) + torch.stack([found.detach().float(), torch.ones_like(found).float()])
        return self.weight * found


def router_loss(model: PreTrainedModel | nn.Module, args: ModelArguments) -> RouterLoss | None:
    """The router loss of a run with --router_aux_loss, weighted by --router_aux_loss_coef or the checkpoint's own
    value.

    Raises:
        ArgumentError: for a model without such a loss, or without a weight for it.
    """
    if not args.router_aux_loss:
        return None
    base = base_of(model)
    if not gives_router_loss(type(base)):
        raise ArgumentError(f"--router_aux_loss: {type(base).__name__} has no routers' loss; leave it out")
    own = getattr(base, "router_aux_loss_coef", getattr(base.config, "router_aux_loss_coef", None))
    weight = own if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    if not weight:
        raise ArgumentError(
            f"--router_aux_loss: the checkpoint's weight for it is {own}; give one, as --router_aux_loss_coef 0.001"
        )
    logger.info(f"routers' loss: {weight:g} times it is added to the loss; router_loss in the log is without that")
    return RouterLoss(model, weight)


class BalancesExperts:
    """Mixin for a Trainer: adds the router loss to the stage's loss if `router` is not None."""

    router: RouterLoss | None = None

    def router_share(self) -> torch.Tensor | float:
        """What the last forward pass adds to the loss: the mean over the batches and processes of a step."""
        return 0.0 if self.router is None else self.router.take() / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the router loss since the last log, over all processes and unweighted, to a training log."""
        if self.router is not None and "loss" in logs:
            total, count = self.accelerator.reduce(self.router.seen, "sum").tolist()
            self.router.seen.zero_()
            logs["router_loss"] = total / count
        super().log(logs, start_time)
