"""Longer contexts by scaled rotary positions: set in the config before the weights load, saved with the merged model.

linear     every position divided by the factor: Chen et al. 2023, https://arxiv.org/abs/2306.15595
dynamic    NTK: the base grows with the row's length beyond the original context; within it nothing changes
yarn       high frequencies stay, low ones are divided, with a ramp between them: Peng et al. 2023, 2309.00071
longrope   a separate factor for each frequency: Ding et al. 2024, 2402.13753

The base frequency `rope_theta` does not change. transformers computes the frequencies from `config.rope_parameters`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PretrainedConfig

from stagewise.config.arguments import ModelArguments
from stagewise.errors import RopeError

# These name their original context; the others read it from `max_position_embeddings`, which then does not change.
NAMES_ITS_CONTEXT = ("yarn", "longrope")


def scale_rope(config: PretrainedConfig, args: ModelArguments) -> None:
    """Changes the config as --rope_scaling, or an adapter's run.json, says; does nothing without either.

    Raises:
        RopeError: for a model without rotary positions, one that is already scaled differently, longrope without its
            factors, or a length within the model's own context.
    """
    if args.kept_rope is not None:
        restore_rope(config, args.kept_rope)
    if args.rope_scaling is None:
        return
    kind, text = args.rope_scaling, config.get_text_config()
    parameters = rotations(text)
    if parameters is None:
        raise RopeError(
            f"--rope_scaling {kind}: {config.model_type} has no rotary positions (it has learned ones, ALiBi or none)"
        )
    before = parameters.get("rope_type", "default")
    if before not in ("default", kind):
        raise RopeError(
            f"--rope_scaling {kind}: the model's positions are scaled by {before} already, "
            f"{describe_rope(parameters)}; leave the flag out, or start from the model before that"
        )
    context = own_context(text, parameters)
    factor = args.rope_factor or scaling_factor(args, context)
    values: dict[str, Any] = {**parameters, "rope_type": kind, "factor": float(factor)}
    values.pop("type", None)  # the former name of rope_type
    if kind in NAMES_ITS_CONTEXT:
        values["original_max_position_embeddings"] = context
        text.max_position_embeddings = round(context * factor)
    if kind == "longrope":
        values |= longrope_factors(args.rope_factors_file, text, parameters)
    if before == kind and values["factor"] != parameters.get("factor"):
        logger.info(f"rope: {kind} with factor {parameters.get('factor')} becomes {values['factor']:g}")
    set_rotations(text, values)
    logger.info(f"rope: {describe_rope(values)}; own context {context}, now {round(context * factor)} tokens")


def rotations(text: PretrainedConfig) -> dict[str, Any] | None:
    """The parameters of the layers with full attention; None for a model without rotary positions."""
    parameters = getattr(text, "rope_parameters", None)
    if not parameters or getattr(text, "alibi", False):
        return None
    # Families with sliding windows nest them by kind of layer; a window is never longer than the trained context.
    return parameters.get("full_attention", None if _nested(parameters) else parameters)


def _nested(parameters: dict[str, Any]) -> bool:
    return all(isinstance(value, dict) or value is None for value in parameters.values())


def set_rotations(text: PretrainedConfig, values: dict[str, Any]) -> None:
    whole = text.rope_parameters
    text.rope_parameters = {**whole, "full_attention": values} if _nested(whole) else values


def own_context(text: PretrainedConfig, parameters: dict[str, Any]) -> int:
    """The context that the model was trained on before its positions were scaled."""
    named = parameters.get("original_max_position_embeddings")
    return int(named or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings)


def context_of(config: PretrainedConfig) -> int | None:
    """The longest row that a model reads, with scaled positions; None if its config names none."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    parameters = rotations(text)
    if longest and parameters and parameters.get("rope_type") in ("linear", "dynamic"):
        return round(longest * parameters["factor"])
    return longest


def scaling_factor(args: ModelArguments, context: int) -> float:
    """The training length divided by the model's own context."""
    if args.rope_length is None:
        raise RopeError(f"--rope_scaling {args.rope_scaling}: give --rope_factor, how many times {context} tokens")
    name, length = args.rope_length
    if length <= context:
        raise RopeError(
            f"--rope_scaling {args.rope_scaling}: {name} {length} is within the model's own context of {context} "
            "tokens; leave the flag out, or give --rope_factor"
        )
    return length / context


def longrope_factors(file: str | None, text: PretrainedConfig, before: dict[str, Any]) -> dict[str, list[float]]:
    """Longrope's two lists: those of --rope_factors_file, else the model's own.

    Raises:
        RopeError: if there are none, or they are not one number per rotated pair of dimensions.
    """
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = int(size * before.get("partial_rotary_factor", 1.0)) // 2
    names = ("short_factor", "long_factor")
    if file is None:
        if all(name in before for name in names):
            return {}
        raise RopeError(
            f"--rope_scaling longrope: has no formula but {pairs} searched factors for this model, and none are in "
            'its config. Write {"short_factor": [...], "long_factor": [...]} to a file and give --rope_factors_file, '
            "or use yarn"
        )
    path = Path(file)
    if not path.is_file():
        raise RopeError(f"--rope_factors_file {file}: no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RopeError(f"--rope_factors_file {file}: not valid json: {error}") from error
    for name in names:
        values = found.get(name) if isinstance(found, dict) else None
        numbers = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values
        )
        if not numbers or len(values) != pairs:
            told = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise RopeError(
                f"--rope_factors_file {file}: {name}: expected {pairs} numbers above 0, one for each rotated pair of "
                f"dimensions, found {told}"
            )
    return {name: [float(value) for value in found[name]] for name in names}


def describe_rope(parameters: dict[str, Any]) -> str:
    factor = parameters.get("factor")
    return f"{parameters.get('rope_type', 'default')}{'' if factor is None else f', factor {factor:g}'}"


# --------------------------------------------------------------------------------------------------- kept by adapters


def kept_rope(config: PretrainedConfig) -> dict[str, Any]:
    """The entry of a scaled model in run.json, for `restore_rope`."""
    text = config.get_text_config()
    return {
        "rope_parameters": copy.deepcopy(text.rope_parameters),
        "max_position_embeddings": text.max_position_embeddings,
    }


def restore_rope(config: PretrainedConfig, kept: dict[str, Any]) -> None:
    """Scales a base's config as in the training of the adapter on it; `kept` is "rope" of the adapter's run.json."""
    text = config.get_text_config()
    if rotations(text) is None:
        raise RopeError(f"the adapter was trained with scaled positions, which a {config.model_type} base has not")
    text.rope_parameters = copy.deepcopy(kept["rope_parameters"])
    text.max_position_embeddings = kept["max_position_embeddings"]
    logger.info(f"rope: {describe_rope(rotations(text))}, as the adapter was trained")


def write_rope(raw: dict[str, Any], config: PretrainedConfig) -> None:
    """Writes a scaled config's positions into a config.json, in the spelling that the file uses: new or old.

    Programs that read the old spelling (`rope_scaling` beside `rope_theta`) can still read the file.
    """
    text = config.get_text_config()
    part = raw.get("text_config", raw) if text is not config else raw
    values = copy.deepcopy(text.rope_parameters)
    part["max_position_embeddings"] = text.max_position_embeddings
    older = "rope_parameters" not in part and not _nested(values)
    if older:
        part.setdefault("rope_theta", values["rope_theta"])
        part["rope_scaling"] = {name: value for name, value in values.items() if name != "rope_theta"}
        return
    part.pop("rope_scaling", None)  # it would take precedence over rope_parameters
    part["rope_parameters"] = values


def check_continued(args: ModelArguments, flag: str, folder: str, kept: dict[str, Any] | None) -> None:
    """Raises RopeError if a run continues from an adapter whose positions were scaled differently."""
    if kept is None:
        return
    own = kept["rope_parameters"].get("full_attention", kept["rope_parameters"])
    same = (args.rope_scaling, args.rope_factor) == (own["rope_type"], own["factor"])
    if not same:
        raise RopeError(
            f"--{flag} {folder}: was trained with --rope_scaling {own['rope_type']} --rope_factor {own['factor']:g}; "
            "give the same"
        )
