"""Merging an adapter into its base shard by shard: one shard in memory at a time."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from stagewise.adapters.attach import add_delta, lora_delta
from stagewise.artifacts.weight_files import INDEX, check_header, shard_names
from stagewise.errors import ArgumentError


@dataclass
class Plan:
    """The plan for each tensor; names are those in the base's files.

    A file with `layers = {"q_proj.weight": …}`, `whole = {"embed.weight": …}` and `dropped = {"lm_head.weight"}`:

        base       embed.weight    q_proj.weight     norm.weight    lm_head.weight
        merged     the adapter's   W + scale · BA    as it is       –                 + new
    """

    files: dict[str, list[str]]  # shard → names in it
    layers: dict[str, LoraLayer]
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    new: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    untied: bool = False  # embedding and head were trained separately


def shards_of(folder: Path) -> dict[str, list[str]]:
    """Each safetensors file of a model directory with the names in it; empty for other weight formats."""
    names = shard_names(folder) or [name for name in ("model.safetensors",) if (folder / name).is_file()]
    files = {}
    for name in names:
        check_header(folder / name)
        with safe_open(folder / name, framework="pt") as shard:
            files[name] = list(shard.keys())
    return files


def plan_shards(
    base: Path, skeleton: PreTrainedModel, config: PeftConfig, weights: dict[str, torch.Tensor]
) -> Plan | str:
    """Finds each adapted weight in the base's files by name.

    Args:
        base: the base's directory.
        skeleton: the adapter's model, on the meta device; not changed.
        config: the adapter's.
        weights: the adapter's tensors, with the names of the skeleton.

    Returns:
        the plan, or the reason why this base and adapter have to be merged in memory.

    Raises:
        FileError: if the base's index names files elsewhere, or a file is truncated.
        ArgumentError: if the adapter has weights for layers that the model does not have.
    """
    head, embedding = tied_names(skeleton)
    reason = _needs_memory(config, skeleton.config, weights)
    if head and (head in weights) != (embedding in weights):
        reason = "embedding and head are tied in the base and only one of them was trained"
    files = {} if reason else shards_of(base)
    if not files:
        return reason or "the base has no safetensors files"
    lora = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    stored = {name for names in files.values() for name in names}
    prefix = skeleton.base_model_prefix + "."

    def stored_as(name: str) -> str | None:
        # BLOOM and GPT-2 checkpoints, among others, omit the inner model's prefix.
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in stored), None)

    layers = adapted_layers(skeleton, config, lora)
    whole = {name: tensor for name, tensor in weights.items() if name not in lora}
    # a base has no reward head, and may omit a tied head
    needed = [*layers, *(name for name in whole if name not in ("score.weight", head))]
    if lost := [name for name in needed if stored_as(name) is None]:
        return f"the base's files have no {lost[0]} (one of {len(lost)}): such names are converted while loading"
    plan = Plan(files, {stored_as(name): layer for name, layer in layers.items()})
    if head in whole:
        plan.untied = not torch.equal(whole[head], whole[embedding])
        if not plan.untied:
            del whole[head]
            plan.dropped |= {head} & stored  # some checkpoints store the tied head as well
    for name, tensor in whole.items():
        stored_name = stored_as(name)
        (plan.new if stored_name is None else plan.whole)[stored_name or name] = tensor
    if "score.weight" in plan.new:  # a base language model becomes a reward model
        plan.dropped |= {"lm_head.weight"} & stored
    return plan


def _needs_memory(config: PeftConfig, base: PretrainedConfig, weights: dict[str, torch.Tensor]) -> str | None:
    if getattr(base, "quantization_config", None):
        return "the base is quantized and is loaded in more bits"
    if config.peft_type.value != "LORA":
        return f"{config.peft_type.value} layers are merged by PEFT"
    special = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
    asked = [name for name in special if getattr(config, name, None)]
    if config.init_lora_weights not in (True, False, "gaussian"):  # PiSSA and similar methods change the base first
        asked.append(f"init_lora_weights {config.init_lora_weights}")
    if asked or config.bias != "none" or any(".base_layer." in name for name in weights):
        return f"adapters with {asked[0] if asked else 'trained biases or embeddings'} are merged by PEFT"
    return None


def tied_names(model: PreTrainedModel) -> tuple[str | None, str]:
    """The weight names of head and input embedding; the head's is None unless the two are tied."""
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return (names[id(head)] if tied else None), names[id(embedding)]


def adapted_layers(
    skeleton: PreTrainedModel, config: PeftConfig, lora: dict[str, torch.Tensor]
) -> dict[str, LoraLayer]:
    """PEFT's layers by the name of the weight they change, with A and B loaded; they know scale and orientation."""
    wrapped = get_peft_model(skeleton, _for_layers_only(config), low_cpu_mem_usage=True)
    layers, used = {}, set()
    for path, layer in wrapped.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for kind in layer.adapter_layer_names:
            linear, embedded = f"{path}.{kind}.weight", f"{path}.{kind}"
            if linear in lora:
                getattr(layer, kind)["default"].weight = torch.nn.Parameter(lora[linear].float(), requires_grad=False)
            elif embedded in lora:
                getattr(layer, kind)["default"] = torch.nn.Parameter(lora[embedded].float(), requires_grad=False)
            used |= {linear, embedded}
        layers[f"{path}.weight"] = layer
    wrapped.unload()
    if unused := sorted(set(lora) - used):
        raise ArgumentError(f"{type(skeleton).__name__} has no layer for the adapter's {unused[0]} ({len(unused)})")
    return layers


def _for_layers_only(config: PeftConfig) -> PeftConfig:
    """The same config without fully trained modules, which are taken from the adapter's file."""
    without: dict[str, Any] = dict.fromkeys(("modules_to_save", "task_type", "base_model_name_or_path"))
    return type(config)(**{**config.to_dict(), **without, "ensure_weight_tying": False, "inference_mode": True})


def merge_shards(base: Path, plan: Plan, folder: Path) -> torch.dtype:
    """Writes the merged shards into `folder`, with the names and contents of the base's shards.

    Returns:
        the precision of the merged layers.

    Raises:
        ArgumentError: if a shape differs, as in a base that is not the adapter's own.
    """
    weight_map: dict[str, str] = {}
    size, dtype = 0, torch.float32
    bar = tqdm(
        total=sum(map(len, plan.files.values())), desc="merging", unit=" tensors", disable=not sys.stderr.isatty()
    )
    for file, names in plan.files.items():
        shard = {}
        with safe_open(base / file, framework="pt") as stored:
            for name in names:
                bar.update()
                if name not in plan.dropped:
                    shard[name] = _merged(name, stored.get_tensor(name), plan)
                if name in plan.layers:
                    dtype = shard[name].dtype
        if file == list(plan.files)[-1]:
            shard |= {name: tensor.contiguous() for name, tensor in plan.new.items()}
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    bar.close()
    if (base / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    logger.info(f"merged {len(plan.layers)} layers in {len(plan.files)} shards, {len(plan.whole | plan.new)} in full")
    return dtype


def _merged(name: str, tensor: torch.Tensor, plan: Plan) -> torch.Tensor:
    """One merged tensor, in the base's precision."""
    delta = lora_delta(plan.layers[name]) if name in plan.layers else None
    for new in (plan.whole.get(name), delta):
        if new is not None and new.shape != tensor.shape:
            shapes = f"{tuple(new.shape)} in the adapter, {tuple(tensor.shape)} in the base"
            raise ArgumentError(f"{name}: {shapes}: give the base that it was trained on with --base_model")
    result = plan.whole.get(name, tensor)
    if delta is not None:
        result = add_delta(result, delta)
    return result.to(tensor.dtype).contiguous()
