"""Estimates the GPU memory of a stage from the model's structure alone; docs/memory.md explains it.

Nothing is loaded: the model is built on torch's meta device, with the stage's own adapter, and its layers are counted.
The estimate is the peak of torch's allocator during a step (`torch.cuda.max_memory_allocated`). The CUDA context,
about half a GiB, and the allocator's reserve come on top.

Names in the formulas, per token of a batch: H hidden size, Q width of all query heads, K width of the key heads, I
width of the feed-forward layer (of all k chosen experts), V vocabulary; c bytes of a number in computation (2 in 16
bit, 4 in 32), s bytes of a number in the residual stream (the precision of the weights).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stagewise.errors import EstimateError
from stagewise.models.memory.structure import Layer, base_layer, decoder_layers, measure_layer

# Bytes of optimizer state per trained parameter: states in the parameter's precision, and bytes of others.
OPTIMIZERS: dict[str, tuple[int, float]] = {
    "adamw_torch": (2, 0),
    "adamw_torch_fused": (2, 0),
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "adamw_bnb_8bit": (0, 2 * (1 + 4 / 256)),
    "adamw_8bit": (0, 2 * (1 + 4 / 256)),
    "lion_8bit": (0, 1 + 4 / 256),
    "lion_32bit": (0, 4),
    # bitsandbytes moves these between GPU and CPU by pages, outside of torch's allocator
    "paged_adamw": (0, 8),
    "paged_adamw_32bit": (0, 8),
    "paged_adamw_8bit": (0, 2 * (1 + 4 / 256)),
    "paged_lion_32bit": (0, 4),
    "paged_lion_8bit": (0, 1 + 4 / 256),
}
PAGED = frozenset(name for name in OPTIMIZERS if name.startswith("paged"))
# Optimizers that update all parameters at once temporarily make one more copy of them.
COPIES_PARAMETERS = frozenset(("adamw_torch", "sgd", "adagrad"))
# Families whose estimated activations were compared with the tensors that autograd saves, in
# tests/models/memory/test_estimate.py.
COMPARED = frozenset(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma"))
WORKSPACE = 64 * 2**20  # of the matrix products
LOGIT_BYTES = 12  # float32: the softmax's output, the gradients of loss and logits
BLOCK = 64  # weights that share a scale in 4 bit


@dataclass(frozen=True)
class TrainingStep:
    """The contents of a training step, from the flags."""

    rows: int  # sequences of one forward pass
    tokens: int  # of each
    logit_tokens: int  # positions of all rows at which logits are computed
    autocast: bool = False  # --bf16 or --fp16
    mask_width: int = 0  # keys per token's row of the attention mask; 0: no mask
    checkpointing: bool = False
    accumulates: bool = False  # --gradient_accumulation_steps above 1
    optim: str = "adamw_torch_fused"
    bits: int | None = None  # of the base's linear layers
    double_quantization: bool = True
    experts_in_bits: bool = False  # whether 3-D expert parameters are quantized, too
    reference: bool = False  # a second, frozen model


@dataclass
class Memory:
    """Bytes by category; `peak` is the worst moment of the step."""

    weights: float = 0.0
    reference: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    # with checkpointing, which cannot free them; without it the inputs are among the activations
    inputs_of_8_bit_layers: float = field(default=0.0, metadata={"called": "inputs of 8 bit layers"})
    outliers_of_8_bit_layers: float = field(default=0.0, metadata={"called": "outliers of 8 bit layers, half"})
    logits: float = 0.0
    working: float = 0.0  # at the worst moment, everything else
    peak: float = 0.0
    moment: str = ""

    def rows(self) -> list[tuple[str, float]]:
        """(name, bytes) of each part of the peak."""
        parts = [f for f in fields(self) if f.name not in ("peak", "moment")]
        return [(f.metadata.get("called", f.name), getattr(self, f.name)) for f in parts]


# -------------------------------------------------------------------------------------------------------- quantities


def quantized_bytes(numbers: int, outputs: int, bits: int, double_quantization: bool) -> float:
    """Bytes of a linear layer's weight quantized by bitsandbytes.

    8 bit: one byte each, and a float32 scale per row. 4 bit: half a byte each, and a float32 scale per 64; with double
    quantization a one-byte scale, and a float32 scale per 256 of those.
    """
    if bits == 8:
        return numbers + 4 * outputs
    scales = numbers / BLOCK
    return numbers / 2 + (scales + 4 * scales / 256 if double_quantization else 4 * scales)


def layers_in_bits(model: PreTrainedModel) -> set[int]:
    """Ids of the weights that bitsandbytes quantizes: linear layers except the head, before an adapter is attached."""
    kept = get_keys_to_not_convert(model)
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def weight_bytes(model: nn.Module, step: TrainingStep, in_bits: set[int]) -> float:
    """Bytes of all weights, including an adapter's; tied ones once."""
    total = 0.0
    for name, parameter in model.named_parameters():
        experts = parameter.dim() == 3 and "expert" in name and "lora_" not in name
        if step.bits == 4 and step.experts_in_bits and experts and not parameter.requires_grad:
            total += quantized_bytes(parameter.numel(), 0, 4, step.double_quantization)
        elif step.bits and id(parameter) in in_bits:
            total += quantized_bytes(parameter.numel(), parameter.shape[0], step.bits, step.double_quantization)
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def optimizer_bytes(trained: Iterable[nn.Parameter], optim: str) -> float:
    """Bytes of the optimizer's states.

    Raises:
        EstimateError: for an optimizer whose states are unknown here.
    """
    if optim not in OPTIMIZERS:
        raise EstimateError(f"--optim {optim}: no estimate for it; there are {', '.join(OPTIMIZERS)}")
    states, others = OPTIMIZERS[optim]
    return sum(p.numel() * (states * p.element_size() + others) for p in trained)


def layer_activations(layer: Layer, step: TrainingStep, compute: int, stream: int) -> float:
    """Bytes per token that one layer keeps for its backward pass.

    - a root-mean-square norm: 4 · width (its input in float32), and s · width (Gemma: 4 · width) if its weight is
      trained; a layer norm s · width
    - a linear layer that is trained, or held in 8 bit: its input, c each; layers that read the same tensor keep it
      once, but each its own 16-bit copy where autocast makes one of a 32-bit stream
    - a frozen one in 16, 32 or 4 bit: nothing
    - a LoRA adapter: its input once more, 2 each under autocast, else 4, 1 more for its dropout's mask; and its rank.
      On a quantized base, under autocast and without dropout, it is the layer's own input and counts once
    - attention: c · (2 Q + 2 K), queries, keys, values and its output, and 4 a head. With a
      mask, as several documents in a row or padding need it, keys and values are repeated for each query head (K = Q),
      and the mask is kept, c for each key that its row spans. Where the architecture writes the scores out, (4 + c)
      for each head and token besides
    - a gated feed-forward layer 3 c · I (gate, its activation, up); another 2 c · I
    - experts in one parameter, which are computed in the weights' precision, autocast or not: as a feed-forward layer,
      with s in place of c, and s · H for each that is chosen, before its share is weighed; if they are trained or have
      an adapter, their inputs, s · (H + I), too
    """
    kept = 0.0
    for norm in layer.norms:
        scaled = (4 if norm.in_float32 else stream) * norm.trained
        kept += norm.width * (4 + scaled if norm.root_mean_square else stream)
    if stream == compute:
        kept += layer.trained_inputs * compute
    else:
        kept += layer.trained_copies * compute
    if step.bits == 8:
        kept += layer.inputs * compute
    lora = 2 if step.autocast else 4
    if layer.adapter_dropout or not (step.autocast and step.bits):
        kept += layer.adapter_inputs * (lora + layer.adapter_dropout)
    elif step.bits == 4:
        kept += layer.inputs * lora
    kept += layer.adapter_ranks * lora
    keys = layer.query if step.mask_width else layer.key
    kept += compute * (2 * layer.query + 2 * keys + step.mask_width) + 4 * layer.heads
    if layer.scores:
        kept += (4 + compute) * layer.heads * step.tokens
    kept += compute * layer.middle * (3 if layer.gated else 2)
    kept += stream * (layer.experts + layer.expert_middle * (3 if layer.gated else 2))
    if layer.trained_experts:
        kept += stream * (layer.experts + layer.expert_middle)
    return kept


def held_in_8_bit(layer: Layer, compute: int) -> tuple[int, float]:
    """Bytes per token that bitsandbytes' int8 product keeps in a layer, checkpointed or not.

    It keeps them as attributes of its autograd node instead of `save_for_backward`, so checkpointing does not free
    them, and they stay until the graph is gone, after the whole backward pass.

    Returns:
        (inputs, outliers): the input of every linear layer, c each, once for layers that read the same tensor; and
        another copy of those of its columns that have a value of 6 or more in any token. The product of gate and up
        is where such values are. How many depends on the weights, from none (random ones of 1.5B) to all I (random
        ones of 8B and more): half of them are counted.
    """
    return compute * (layer.inputs + layer.attended), compute * layer.downward / 2


def estimate(model: nn.Module, step: TrainingStep, in_bits: set[int]) -> Memory:
    """The memory of a training step of a model without weights, with its adapter, if any.

    Three moments can be the worst: the loss (all activations and the logits), the last layer's backward pass (with
    checkpointing: one recomputed layer), and the end of the backward pass (all gradients).

    Args:
        model: on the meta device; trained parameters have requires_grad.
        step: the contents of a step.
        in_bits: the result of `layers_in_bits` before the adapter was attached.

    Raises:
        EstimateError: for an architecture or optimizer that is unknown here.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [measure_layer(layer, base.config) for layer in decoder_layers(base)]
    for layer in layers:
        layer.scores = not getattr(type(base), "_supports_sdpa", False)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    embedding = base_layer(embedding)
    stream = embedding.weight.element_size()
    compute = 2 if step.autocast else stream
    hidden = base.config.get_text_config().hidden_size
    tokens = step.rows * step.tokens
    trained = [p for p in model.parameters() if p.requires_grad]
    memory = Memory(
        weights=weight_bytes(model, step, in_bits),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=optimizer_bytes(trained, step.optim),
    )
    if step.reference:
        memory.reference = memory.weights
    always = memory.weights + memory.reference + memory.optimizer + WORKSPACE

    whole = [layer_activations(layer, step, compute, stream) * tokens for layer in layers]
    widest = max(range(len(layers)), key=whole.__getitem__)
    # 16-bit copies of 32-bit weights, and dequantized experts, stay until the backward pass has used them
    casts = [_weight_copies(layer, step, compute, stream) for layer in layers]
    kept = stream * hidden * tokens * len(layers) if step.checkpointing else sum(whole) + sum(casts)
    anew = whole[widest] + casts[widest] if step.checkpointing else 0.0
    kept += 4 * hidden * tokens
    if head is not None:
        numbers = head.weight.shape[0] * hidden
        kept += compute * hidden * step.logit_tokens * _trains(head) + compute * numbers * (compute < stream)
        memory.logits = float(LOGIT_BYTES * head.weight.shape[0] * step.logit_tokens)
    memory.activations = kept
    if step.bits == 8 and step.checkpointing:
        inputs, outliers = zip(*(held_in_8_bit(layer, compute) for layer in layers), strict=True)
        memory.inputs_of_8_bit_layers, memory.outliers_of_8_bit_layers = tokens * sum(inputs), tokens * sum(outliers)
    held = memory.inputs_of_8_bit_layers + memory.outliers_of_8_bit_layers
    kept += held

    beside = _beside(layers[widest], step, compute) * tokens + _put_together(layers[widest], step, stream)
    tied = head is not None and head.weight is embedding.weight and embedding.weight.requires_grad
    twice = embedding.weight.numel() * embedding.weight.element_size() if tied else 0
    last = max(twice, anew + beside if step.checkpointing else whole[0] + casts[0] + beside)
    before = memory.gradients if step.accumulates else 0.0
    moments = {
        "the loss": (before + kept + memory.logits, 0.0),
        "the backward pass of the last layers": (before + kept + anew + beside, anew + beside),
        "the end of the backward pass": (memory.gradients + held + last, last),
    }
    if step.optim in COPIES_PARAMETERS:
        moments["the optimizer's step"] = (2.0 * memory.gradients, float(memory.gradients))
    memory.moment, (most, memory.working) = max(moments.items(), key=lambda item: item[1][0])
    memory.working += WORKSPACE
    memory.peak = always + most
    return memory


def _trains(head: nn.Module) -> bool:
    return any(p.requires_grad for p in head.parameters())


def _weight_copies(layer: Layer, step: TrainingStep, compute: int, stream: int) -> float:
    """Bytes of a layer's weights that are made in the forward pass and kept for the backward pass.

    Experts that are dequantized, or have an adapter added, in the precision of the weights; nothing else, since the
    adapter is added in place, or by one product that adds. Its matrices are cast to that precision, too.
    """
    copies = 2.0 * layer.adapter_numbers if step.autocast else 0.0
    if compute < stream and step.bits is None:
        copies += compute * layer.linear_numbers
    if layer.adapted_experts or (step.bits == 4 and step.experts_in_bits):
        copies += stream * layer.expert_numbers + (stream * layer.expert_adapter_numbers if stream < 4 else 0)
    return copies


def _beside(layer: Layer, step: TrainingStep, compute: int) -> float:
    """Bytes per token of the gradients of the widest layer: two of I, and two more in float32 for LoRA."""
    wide = max(layer.middle, layer.expert_middle, layer.query, layer.norms[0].width if layer.norms else 0)
    cast = layer.adapter_inputs and not (step.autocast and step.bits)
    return wide * (2 * compute + (8 if cast else 0))


def _put_together(layer: Layer, step: TrainingStep, stream: int) -> float:
    """Bytes of weights made for one product: a dequantized linear layer, or the gradient of experts with an adapter.

    That gradient belongs to the sum of adapter and weight, so it has the weight's size. The last parameter's coexists
    with all copies, the first one's with all but the last.
    """
    linear = 2.0 * layer.largest_linear if step.bits else 0.0
    if not layer.adapted_experts:
        return linear
    others = layer.expert_numbers - layer.largest_experts
    return max(linear, stream * float(max(others, layer.largest_experts - others)))
