"""Loading a base in 8 or 4 bit with bitsandbytes: its linear layers, and experts that are 3-D parameters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from stagewise.config.arguments import ModelArguments
from stagewise.errors import ModelError
from stagewise.models.config import DTYPES
from stagewise.models.quantization.experts import hold, is_expert_stack, pack

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

METHOD = "bitsandbytes_with_experts"
MOST = 2**31 - 1  # numbers that bitsandbytes can quantize at once: it counts in 32 bit without a check (0.50.2)


def quantization_options(args: ModelArguments, config: PretrainedConfig) -> dict[str, Any]:
    """from_pretrained's options for a base that is quantized while it loads; empty otherwise.

    4 bit is nf4, fitted to the distribution of weights (https://arxiv.org/abs/2305.14314); --qlora also quantizes the
    scales of its blocks. The output head, and modules trained in full, are not quantized.

    Raises:
        ModelError: for a checkpoint that is already quantized.
    """
    if args.bits is None:
        return {}
    flag = "--qlora" if args.qlora else f"--load_in_{args.bits}bit"
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{flag}: {args.model_name_or_path} is quantized already; leave the flag out")
    if args.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    own = config.get_text_config().dtype or torch.float32
    compute = (own if isinstance(own, torch.dtype) else DTYPES[own]) if args.torch_dtype == "auto" else None
    how = (ExpertsConfig if args.quantize_experts else BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=args.qlora,
        bnb_4bit_compute_dtype=compute or DTYPES[args.torch_dtype],
    )
    return {"quantization_config": how}


def guard_4bit(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU, which makes LoRA gradients and merges wrong.

    Call it right after every load. It can be removed once bitsandbytes (0.50.2 tested) repacks a copy.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def guard_8bit(model: nn.Module) -> None:
    """Keeps the scales of 8-bit weights on a CPU, where PEFT's DoRA recreates each weight without them.

    bitsandbytes takes a layer's scales from its weight whenever that is new. It can be removed once PEFT (0.21.2
    tested) leaves the weight alone.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.init_8bit_state = partial(_take_state, module)


def _take_state(layer: nn.Module) -> None:
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    type(layer).init_8bit_state(layer)
    layer.state.SCB = scales


# ------------------------------------------------------------------------------------------------ experts as they load


@register_quantization_config(METHOD)
class ExpertsConfig(BitsAndBytesConfig):
    """4 bit for linear layers and for experts that are 3-D parameters; once loaded it is bitsandbytes' own config."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Packs each stack of experts as it is read: never two in 16 bit at once."""

    def __init__(self, quantization_config: ExpertsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.states: dict[str, QuantState] = {}
        self.packed = False

    def is_serializable(self) -> bool:
        """Whether save_pretrained may write the base: no code reads packed experts from a file."""
        return not self.packed

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        experts = name in module._parameters and is_expert_stack(param_name, module._parameters[name])
        return experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if is_expert_stack(name, parameter) and parameter.numel() > MOST:
                raise ModelError(
                    f"{name} has {parameter.numel():,} numbers, of which bitsandbytes quantizes {MOST:,} at once; "
                    "leave such experts in 16 bit (--quantize_experts False)"
                )
        super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for path, state in self.states.items():
            module, name = get_module_from_name(model, path)
            hold(module, {name: state})
        self.packed, self.states = bool(self.states), {}
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Pack(ConversionOps):
    """Called by from_pretrained for each weight to be quantized."""

    def __init__(self, quantizer: ExpertsQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **kwargs: Any) -> dict:
        from transformers.integrations.bitsandbytes import Bnb4bitQuantize

        result = {}
        for path, value in input_dict.items():
            module, name = get_module_from_name(model, path)
            if not is_expert_stack(path, module._parameters[name]):
                result |= Bnb4bitQuantize(self.quantizer).convert({path: value}, model=model, **kwargs)
                continue
            weight = value[0] if isinstance(value, list) else value
            twice = self.quantizer.quantization_config.bnb_4bit_use_double_quant
            result[path], self.quantizer.states[path] = pack(weight, twice=twice)
        return result
