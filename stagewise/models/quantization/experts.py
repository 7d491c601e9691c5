"""Experts stored as one 3-D parameter, held in 4 bit, and LoRA on them.

bitsandbytes quantizes linear layers as they load; this does the same for experts that are not layers. The packed
parameter keeps its name, its position and three dimensions, and the module dequantizes it when it is read: once per
forward pass.

bitsandbytes' own mechanism for this (`bitsandbytes.nn.parametrize`) does not work with PEFT's LoRA on a parameter
(PEFT 0.21.2, bitsandbytes 0.50.2): PEFT finds such a parameter only by its full path; it nests two of one module in
reverse order, so a 16-bit base could not read the adapter; it reads the inner one from a cache filled without its
LoRA, so that LoRA gets no gradient; and it leaves its additions behind, so a second forward pass fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from stagewise.errors import AdapterError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Change = tuple[torch.Tensor, torch.Tensor, float]  # (experts, rows, rank), (experts, rank, columns), their scale


# ------------------------------------------------------------------------------------------------------ how it is held


class QuantizedExperts(nn.Module):
    """What a module with packed parameters is besides its own class; `hold` makes it one."""

    own: type[nn.Module]
    states: dict[str, QuantState]  # by a parameter's name: its scales, shape and precision
    changes: dict[str, list[Change]]
    made: dict[str, torch.Tensor] | None  # the dequantized parameter; None outside of the forward pass

    def whole(self, name: str) -> torch.Tensor:
        """The parameter in its original precision, LoRA added: (experts, rows, columns)."""
        if self.made is not None and name in self.made:
            return self.made[name]
        from bitsandbytes.functional import dequantize_4bit

        with torch.no_grad():
            weight = dequantize_4bit(self._parameters[name].view(-1, 1), self.states[name])
        with torch.autocast(weight.device.type, enabled=False):
            for left, right, scale in self.changes.get(name, ()):
                weight.baddbmm_(left, right, alpha=scale)  # in place: no second tensor of this size
        if self.made is not None:
            self.made[name] = weight
        return weight

    def shaped(self, name: str) -> torch.Tensor:
        """A tensor of the full parameter's shape, precision and device that takes no memory."""
        state = self.states[name]
        return torch.empty(1, dtype=state.dtype, device=self._parameters[name].device).expand(state.shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves or casts what is not a parameter along with the others: the scales, and the target precision."""
        super()._apply(fn, recurse)
        for name, state in self.states.items():
            state.to(self._parameters[name].device)
            state.dtype = fn(torch.empty(0, dtype=state.dtype)).dtype
        return self

    @contextmanager
    def changed(self, name: str, changes: Sequence[Change]) -> Iterator[None]:
        """A context in which these are added to the parameter."""
        self.changes[name] = list(changes)
        try:
            yield
        finally:
            del self.changes[name]


@cache
def _class_of(own: type[nn.Module], names: tuple[str, ...]) -> type[QuantizedExperts]:
    readers = {name: property(lambda self, name=name: self.whole(name)) for name in names}
    return type(f"Quantized{own.__name__}", (QuantizedExperts, own), {"own": own, **readers})


def is_expert_stack(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter of this path holds experts that are not layers."""
    return parameter.dim() == 3 and "expert" in name


def pack(weight: torch.Tensor, *, twice: bool) -> tuple[nn.Parameter, QuantState]:
    """Packs a weight (experts, rows, columns) in nf4: two numbers per byte, (experts, rows, columns / 2), and its
    scales.

    Args:
        weight: on the device where it is quantized and stays.
        twice: also quantize the scales.
    """
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=twice, quant_type="nf4")
    return nn.Parameter(packed.view(*weight.shape[:-1], -1), requires_grad=False), state


def hold(module: nn.Module, states: dict[str, QuantState]) -> None:
    """Makes a module, whose parameters with these names are packed, dequantize them on reading."""
    if not isinstance(module, QuantizedExperts):
        module.states, module.changes, module.made = {}, {}, None
        # each expert reads the parameters; checkpointing ends its second forward pass with an exception
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)
    module.states |= states
    own = module.own if isinstance(module, QuantizedExperts) else type(module)
    module.__class__ = _class_of(own, tuple(sorted(module.states)))


def _begin(module: QuantizedExperts, inputs: Any) -> None:
    module.made = {}


def _end(module: QuantizedExperts, inputs: Any, output: Any) -> None:
    module.made = None


# ------------------------------------------------------------------------------------------------------------ adapter


class ParamWrapper(lora.ParamWrapper):
    """PEFT's LoRA on a packed parameter. PEFT nests two on one module only under this class name."""

    def get_param(self) -> torch.Tensor:
        """What PEFT reads shape, precision and device from, without dequantizing the weight."""
        return self.get_base_layer().shaped(self.parameter_name)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        factors = [self.get_delta_factors(name) for name in active_adapters if name in self.lora_A]
        with self.get_base_layer().changed(self.parameter_name, factors):
            yield

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises AdapterError."""
        raise AdapterError(f"{self.parameter_name} is held in 4 bit, into which nothing is merged; load it in 16 bit")


def reach_packed(config: LoraConfig) -> None:
    """Lets an adapter with this config target packed experts; others are handled as usual."""
    config._register_custom_module({QuantizedExperts: ParamWrapper})
