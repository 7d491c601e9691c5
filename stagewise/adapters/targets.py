"""The layers that an adapter targets: every linear one, or those that are named."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stagewise.config.arguments import AdapterArguments
from stagewise.errors import AdapterError

# A module with one of these words in its path belongs to images or audio, which text batches never reach.
OTHER_SENSES = ("vision", "visual", "audio", "image", "multi_modal", "multimodal", "speech")


@dataclass
class Targets:
    """The targets of an adapter: linear layers, expert parameters, and what is left out and why."""

    modules: list[str]
    parameters: list[str] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        return ", ".join([*self.modules, *self.parameters]) + self.note


def choose_targets(model: PreTrainedModel, args: AdapterArguments) -> Targets:
    """Resolves --target_modules.

    `all`: every linear layer and, for plain LoRA, experts stored as one 3-D parameter.

    Raises:
        AdapterError: for names that the model does not have, or experts that the method does not support.
    """
    words, experts = names_of(args.target_modules), fused_experts(model)
    reason = no_experts_because(args)
    if words in (["all"], ["all-linear"]):
        modules = linear_targets(model)
        if experts and reason:
            return Targets(modules, note=f"; left out ({reason}): {', '.join(experts)}")
        return Targets(modules, experts)
    named = [e for e in experts for w in words if e == w or e.endswith(f".{w}") or w.endswith(f".{e}")]
    modules = [w for w in words if not any(e == w or e.endswith(f".{w}") or w.endswith(f".{e}") for e in named)]
    if named and reason:
        raise AdapterError(f"--target_modules {', '.join(named)}: experts held as one 3-D parameter; {reason}")
    check_names(model, "target_modules", modules, (nn.Linear, Conv1D, nn.Embedding))
    if routers := [n for n, m in model.named_modules() if is_router(m) and n.rsplit(".", 1)[-1] in modules]:
        raise AdapterError(
            f"--target_modules {routers[0].rsplit('.', 1)[-1]}: chooses experts and takes no adapter; "
            "--modules_to_save trains it in full"
        )
    return Targets(modules, sorted(set(named)))


def no_experts_because(args: AdapterArguments) -> str | None:
    """The reason why the method does not support experts stored as one 3-D parameter, or None."""
    if args.method == "adalora":
        return "AdaLoRA takes linear layers alone"
    if args.use_dora:
        return "DoRA takes linear layers alone: leave out --use_dora"
    if args.init_lora_weights.startswith("pissa"):
        return "PiSSA takes linear layers alone: leave out --init_lora_weights"
    if args.lora_dropout and args.asks("lora_dropout"):
        return "they have no input of their own to drop from: --lora_dropout 0"
    return None


def linear_targets(model: PreTrainedModel) -> list[str]:
    """Names for `target_modules` of every linear layer: nn.Linear, its 4/8-bit forms, Conv1D, fused projections.

    Left out: the output head, a reward model's head, routers, and the layers of images and audio. A name is the last
    part of the module's path ("q_proj"), or its full path if the last part alone would also match a layer that is left
    out.

    Raises:
        AdapterError: if there is no linear layer.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    heads |= {name for name in linear if name.rsplit(".", 1)[-1] in SEQ_CLS_HEAD_NAMES}
    heads |= {n for n, m in model.named_modules() if n in linear and is_router(m)}
    left_out = {n for n in linear if n in heads or any(w in part for w in OTHER_SENSES for part in n.split("."))}
    taken = linear - left_out
    if not taken:
        raise AdapterError(f"--target_modules all: {type(model).__name__} has no linear layers")
    ambiguous = {name.rsplit(".", 1)[-1] for name in left_out}
    lasts = {name: name.rsplit(".", 1)[-1] for name in taken}
    return sorted({name if last in ambiguous else last for name, last in lasts.items()})


def is_router(module: nn.Module) -> bool:
    """Whether the module is a router: some derive from nn.Linear but return several tensors."""
    return "router" in type(module).__name__.lower()


def fused_experts(model: nn.Module) -> list[str]:
    """Last parts of the names of 3-D expert parameters, which are not linear layers ("experts.gate_up_proj").

    Those in 4 bit also have three dimensions.
    """
    names = (name for name, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) == 3)
    return sorted({".".join(name.split(".")[-2:]) for name in names if "expert" in name})


def names_of(value: str | list[str] | None) -> list[str]:
    """A flag's names: joined by commas, or already a list."""
    parts = value.split(",") if isinstance(value, str) else list(value or [])
    return [part.strip() for part in parts if part.strip()]


def check_names(model: nn.Module, flag: str, wanted: list[str], kinds: tuple[type, ...] | None) -> None:
    """Raises AdapterError if a name matches no module of `kinds` (None: any with its own weights)."""
    exist = {
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, kinds) if kinds else any(True for _ in module.parameters()))
    }
    unknown = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in exist)]
    if not unknown:
        return
    lasts = sorted({last for name in exist if not (last := name.rsplit(".", 1)[-1]).isdigit()})
    experts = fused_experts(model) if flag == "target_modules" else []
    known = ", ".join([*lasts, *experts])
    raise AdapterError(f"--{flag}: {type(model).__name__} has no {', '.join(unknown)}; there are {known}")


def check_pairs(model: PreTrainedModel, targets: list[str], kept: list[str]) -> None:
    """Raises AdapterError for a module named twice, and for one half of a tied pair."""
    if both := sorted(set(targets) & set(kept)):
        raise AdapterError(
            f"--target_modules and --modules_to_save both name {', '.join(both)}: keep it in one of them"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        pair = {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if module is head or module is embedding}
        if named := pair & {target.rsplit(".", 1)[-1] for target in targets}:
            raise AdapterError(f"--target_modules {named.pop()}: embedding and head are tied; use --modules_to_save")


def keep_tie(model: PreTrainedModel, kept: list[str]) -> tuple[list[str], bool]:
    """On a tied model, embedding and head are trained as one weight, whichever was named."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not kept or head.weight is not embedding.weight:
        return kept, False
    pair = {name: module for name, module in model.named_modules() if module is head or module is embedding}
    named = [k for k in kept if any(name == k or name.endswith(f".{k}") for name in pair)]
    if not named:
        return kept, False
    # PEFT restores the tie only if one of its own names (lm_head) is listed, so both always are.
    lasts = [name.rsplit(".", 1)[-1] for name in pair]
    return [*(k for k in kept if k not in named), *lasts], True


def all_conv1d(model: nn.Module, targets: list[str]) -> bool:
    """Whether all are Conv1D, whose weight is (in, out); PEFT needs to be told."""
    kinds = [type(m) for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)]
    return bool(kinds) and all(issubclass(kind, Conv1D) for kind in kinds)
