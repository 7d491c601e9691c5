"""Row-wise quantized linear layers in 8 or 4 bit: one scale per output feature, symmetric, in plain torch.

    from stagewise.models.quantization.row_wise import load_row_quantized

The format in which the CPM and GLM families published their 8 and 4 bit models: a row's largest absolute value becomes
127 (or 7), every weight is rounded to the nearest step, and the layer dequantizes the weight to compute in 16 or 32
bit. All linear layers except the output head are quantized. A model saved in this format loads through
`from_pretrained` once this module has been imported. It is for inference, not for training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from stagewise.artifacts.weight_files import check_hashes, check_weight_files
from stagewise.errors import RowQuantizationError

METHOD = "row_wise"  # quant_method in config.json
BITS = (4, 8)


# ------------------------------------------------------------------------------------------------------------- numbers


def quantize_rows(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to integer steps of its own scale.

    With m = 2^(bits-1) - 1 steps to either side: scale = max|row| / m, step = round(weight / scale), ties to even. The
    steps are computed in float64, so every device gives the same result. A row of zeros has scale 0.

    Args:
        weight: (O, I), floating.
        bits: 8 or 4.

    Returns:
        steps (O, I) in int8, within ±m; scales (O,) in float32.

    Raises:
        RowQuantizationError: for a non-finite weight, or other bits.
    """
    if bits not in BITS:
        raise RowQuantizationError(f"expected 4 or 8 bits, found {bits}")
    most = 2 ** (bits - 1) - 1
    exact = weight.detach().double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise RowQuantizationError("a weight is NaN or infinite: the model cannot be quantized")
    divisor = torch.where(largest == 0, torch.ones_like(largest), largest)
    steps = torch.round(exact * most / divisor).to(torch.int8)
    return steps, (largest[:, 0] / most).float()


def pack_pairs(steps: torch.Tensor) -> torch.Tensor:
    """Two 4-bit steps per byte, the even column in the upper half: (O, I) int8 -> (O, I / 2) int8."""
    return (steps[:, 0::2] << 4) | (steps[:, 1::2] & 0x0F)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """(O, I / 2) int8 -> (O, I) int8, within ±7; the shifts keep the sign."""
    return torch.stack([packed >> 4, (packed << 4) >> 4], dim=-1).flatten(1)


# -------------------------------------------------------------------------------------------------------------- layers


class RowQuantizedLinear(nn.Module):
    """A linear layer that stores its weight as integer steps and one scale per row.

    weight: (out, in) int8, or (out, in / 2) with two steps per byte; weight_scale: (out,) float32; bias: (out,) or
    None.
    """

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None, bits: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        columns = in_features if bits == 8 else in_features // 2
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear | Conv1D, bits: int) -> RowQuantizedLinear:
        """The quantized form of a layer, on its device."""
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], layer.bias, bits)
        if weight.device.type != "meta":
            steps, scale = quantize_rows(weight, bits)
            packed = steps if bits == 8 else pack_pairs(steps)
            made.weight = nn.Parameter(packed.contiguous(), requires_grad=False)
            made.weight_scale = nn.Parameter(scale, requires_grad=False)
            if layer.bias is not None:
                made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return made

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight: (out, in)."""
        steps = self.weight if self.bits == 8 else unpack_pairs(self.weight)
        return (steps.float() * self.weight_scale.float().unsqueeze(1)).to(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out), in the precision of `hidden`."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.dequantized(hidden.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def rows_to_quantize(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers except the output head."""
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in layers if model.get_submodule(name) is not head]


def check_rows(model: PreTrainedModel, bits: int) -> list[str]:
    """Checks whether `quantize_model` can process the model, which may be without weights.

    Raises:
        RowQuantizationError: if there is no linear layer, or a row of odd length for 4 bits.
    """
    names = rows_to_quantize(model)
    if not names:
        raise RowQuantizationError(f"{type(model).__name__} has no linear layers except its head")
    for name in names if bits == 4 else []:
        layer = model.get_submodule(name)
        inputs = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
        if inputs % 2:
            raise RowQuantizationError(
                f"{name} has {inputs} inputs; two 4-bit steps share a byte, so take --quantization_bit 8"
            )
    return names


def quantize_model(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Replaces every linear layer except the head by its quantized form, one at a time; returns the same model.

    Raises:
        RowQuantizationError: see `check_rows`.
    """
    for name in check_rows(model, bits):
        model.set_submodule(name, RowQuantizedLinear.of(model.get_submodule(name), bits))
    config = RowQuantizationConfig(bits)
    model.config.quantization_config = config
    model.hf_quantizer = RowQuantizer(config, pre_quantized=True)
    model.quantization_method, model.is_quantized = METHOD, True
    return model.requires_grad_(False)


# -------------------------------------------------------------------------------------- what from_pretrained asks for


@register_quantization_config(METHOD)
class RowQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json: {"quant_method": "row_wise", "bits": 8}."""

    def __init__(self, bits: int, **kwargs: Any):
        if bits not in BITS:
            raise RowQuantizationError(f"config.json: expected 4 or 8 bits, found {bits}")
        self.quant_method, self.bits = METHOD, bits


@register_quantizer(METHOD)
class RowQuantizer(HfQuantizer):
    """Inserts `RowQuantizedLinear` for quantized layers of the checkpoint before the weights are read."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise RowQuantizationError("the weights are not in this form yet: python -m tools.quantize_model makes it")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in check_rows(model, self.quantization_config.bits):
            layer = model.get_submodule(name)
            model.set_submodule(name, RowQuantizedLinear.of(layer.to("meta"), self.quantization_config.bits))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, RowQuantizedLinear) and module.weight.dtype != torch.int8:
                raise RowQuantizationError(f"{name}: the weight was read as {module.weight.dtype}, not as int8")
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def load_row_quantized(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Loads a causal language model saved in this format; `options` go to from_pretrained.

    Raises:
        RowQuantizationError: if the directory's config.json names another format, or none.
        FileError: a file is truncated, names others elsewhere, or is not what was saved.
    """
    check_weight_files(Path(folder))
    check_hashes(Path(folder))
    config = AutoConfig.from_pretrained(folder)
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    if method != METHOD:
        raise RowQuantizationError(
            f"{folder}: its config.json says {method or 'nothing'} where {METHOD!r} is expected"
        )
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
