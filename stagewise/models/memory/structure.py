"""A model without weights: its parameters by kind, and the widths of its layers.

The model is on torch's meta device, with or without a stage's adapter; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from stagewise.errors import EstimateError

KINDS = ("embedding", "attention", "MLP", "experts", "norms", "head", "adapter", "other")


# -------------------------------------------------------------------------------------------------------- parameters


def kind_of(name: str, module: nn.Module, owner: str) -> str:
    """The kind of a parameter: one of KINDS.

    Args:
        name: the parameter's path.
        module: the module that holds it.
        owner: "head" or "embedding" if the module is the model's output or input embedding, else "".
    """
    parts = name.lower().split(".")
    if any(part.startswith(("lora_", "ranknum", "prompt_", "mlp_head")) or part == "prompt_encoder" for part in parts):
        return "adapter"
    if owner or not {"score", "classifier"}.isdisjoint(parts):
        return owner or "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower() or any("norm" in part or part.startswith("ln_") for part in parts[-2:]):
        return "norms"
    if (
        any("expert" in part or "moe" in part or part == "router" for part in parts)
        or "router" in type(module).__name__.lower()
    ):
        return "experts"
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any("mlp" in part or "ffn" in part or "feed_forward" in part or part in ("fc1", "fc2") for part in parts):
        return "MLP"
    return "other"


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def parameters_of(model: nn.Module, in_bits: Iterable[int] = (), bits: int | None = None) -> list[Parameter]:
    """Every parameter with its kind; tied weights once, as the embedding.

    Args:
        model: with its adapter, if any.
        in_bits: the result of `layers_in_bits` before the adapter was attached.
        bits: the number of bits of those.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    owners = {}
    for owner, end in (("embedding", base.get_input_embeddings()), ("head", base.get_output_embeddings())):
        owners |= {id(module): owner for module in (end.modules() if end is not None else ())}
    found, seen = [], set()
    for path, module in model.named_modules():
        owner = owners.get(id(module), "")
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{path}.{name}" if path else name
            dtype = f"{bits} bit" if id(parameter) in in_bits else str(parameter.dtype).removeprefix("torch.")
            kind = kind_of(full, module, owner)
            found.append(Parameter(full, kind, tuple(parameter.shape), dtype, parameter.requires_grad))
    return found


# ---------------------------------------------------------------------------------------------------- without weights


def skeleton(config: PretrainedConfig, auto: type, dtype: torch.dtype, trust_remote_code: bool = False):
    """A config's model on the meta device: modules and shapes, no weights.

    Raises:
        EstimateError: for an architecture that cannot be built this way.
    """
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise EstimateError(f"{config.model_type}: cannot be built without weights: {error}") from error
    return model


# ------------------------------------------------------------------------------------------------------------ layers


@dataclass(frozen=True)
class Norm:
    width: int
    trained: bool
    root_mean_square: bool
    in_float32: bool  # whether it is scaled before the cast back, as in Gemma


@dataclass
class Layer:
    """One decoder layer: the widths of its activations, in numbers per token, and its weights."""

    norms: list[Norm] = field(default_factory=list)
    inputs: int = 0  # of the linear layers; layers that read the same tensor count once
    attended: int = 0  # input of the attention's output layer, not part of `inputs`
    downward: int = 0  # input of the linear layers that lead from I back to H
    input_copies: int = 0  # of the linear layers, counted separately
    trained_inputs: int = 0
    trained_copies: int = 0
    adapter_inputs: int = 0  # of layers with a LoRA adapter, counted separately
    adapter_ranks: int = 0
    adapter_numbers: int = 0  # weights of the adapters
    adapter_dropout: bool = False
    query: int = 0
    key: int = 0
    heads: int = 0
    scores: bool = False  # whether attention materializes its scores
    middle: int = 0  # I
    expert_middle: int = 0  # I of all experts chosen for a token, if experts are 3-D parameters, else 0
    gated: bool = True
    experts: int = 0  # H · k if experts are 3-D parameters, else 0
    linear_numbers: int = 0  # weights of the linear layers
    expert_numbers: int = 0  # weights of 3-D experts
    largest_experts: int = 0  # of the largest of these parameters
    expert_adapter_numbers: int = 0  # weights of the adapters on them
    trained_experts: bool = False  # either fully, or through an adapter
    largest_linear: int = 0

    @property
    def adapted_experts(self) -> bool:
        return self.expert_adapter_numbers > 0


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules of one model: its decoder layers.

    Raises:
        EstimateError: if there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise EstimateError(f"{type(model).__name__} has no list of layers: no estimate for this architecture")
    return list(max(lists, key=lambda found: (sum(p.numel() for p in found.parameters()), len(found))))


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that an adapter wraps, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _width(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    base = base_layer(layer)
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    return base.in_features, base.out_features


def measure_layer(layer: nn.Module, config) -> Layer:
    """Reads the widths of a decoder layer from its modules; linear layers with the same parent and width share their
    input.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None) or 1
    found = Layer(heads=heads, query=heads * size, key=groups * size)
    adapted = {name for name, m in layer.named_modules() if isinstance(m, BaseTunerLayer)}
    shared: dict[tuple[str, int], bool] = {}
    for name, module in layer.named_modules():
        if any(name.startswith(f"{other}.") for other in adapted):
            continue
        kind = type(module).__name__.lower()
        if "norm" in kind and getattr(module, "weight", None) is not None:
            width, trained = _norm_width(name, module, found, size), module.weight.requires_grad
            found.norms.append(Norm(width, trained, "layernorm" not in kind, "gemma" in kind))
        elif isinstance(base_layer(module), (nn.Linear, Conv1D)):
            _add_linear(found, name, module, shared, text.hidden_size)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 3 and "expert" in name and "lora_" not in name:
            found.expert_numbers += parameter.numel()
            found.largest_experts = max(found.largest_experts, parameter.numel())
            found.trained_experts = found.trained_experts or parameter.requires_grad
    found.expert_adapter_numbers = sum(
        p.numel()
        for module in layer.modules()
        if isinstance(module, ParamWrapper)
        for matrices in (module.lora_A, module.lora_B)
        for p in matrices.parameters()
    )
    found.trained_experts = found.trained_experts or found.adapted_experts
    if found.expert_numbers:
        middle = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        found.expert_middle = middle * chosen
        found.experts = text.hidden_size * chosen
    return found


def _norm_width(name: str, module: nn.Module, layer: Layer, size: int) -> int:
    """A norm over single heads runs on all of them."""
    last, width = name.rsplit(".", 1)[-1], module.weight.shape[-1]
    if width != size or not last.startswith(("q_", "k_", "query", "key")):
        return width
    return layer.query if last.startswith("q") else layer.key


def _add_linear(found: Layer, name: str, module: nn.Module, shared: dict[tuple[str, int], bool], hidden: int) -> None:
    base = base_layer(module)
    inputs, outputs = _width(module)
    numbers = base.weight.numel()
    found.linear_numbers += numbers
    found.largest_linear = max(found.largest_linear, numbers)
    last = name.rsplit(".", 1)[-1].lower()
    into_middle = inputs == hidden and _is_up(last)
    if into_middle:
        # gate and up, separate or as one layer
        found.gated = found.gated and "h_to_4h" not in last and last not in ("c_fc", "fc1", "fc_in", "up")
        fused = "gate_up" in last or last == "gate_up_proj"
        width = outputs // 2 if fused else outputs
        found.middle = max(found.middle, width)
    group = (name.rsplit(".", 1)[0], inputs)
    trained = base.weight.requires_grad
    # the attention's own output is counted with the attention
    already = inputs == found.query and last in ("o_proj", "out_proj", "dense", "wo") and "h_to" not in last
    found.input_copies += inputs
    found.trained_copies += inputs * trained
    if not already and group not in shared:
        found.inputs += inputs
        found.trained_inputs += inputs * trained
        shared[group] = trained
        found.downward += inputs * (inputs == found.middle and not into_middle)
    found.attended += inputs * already
    if hasattr(module, "lora_A"):
        adapters = [module.lora_A[key] for key in module.lora_A]
        found.adapter_inputs += inputs
        found.adapter_numbers += sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
        found.adapter_ranks += sum(getattr(adapter, "weight", adapter).shape[0] for adapter in adapters)
        found.adapter_dropout = found.adapter_dropout or any(
            isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in module.lora_dropout.values()
        )


def _is_up(last: str) -> bool:
    return any(word in last for word in ("gate", "up", "h_to_4h", "c_fc", "fc1", "fc_in", "w1", "w3"))
