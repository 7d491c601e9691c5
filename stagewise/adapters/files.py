"""An adapter's directory: its config, and the names of its weights, without loading them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open

from stagewise.artifacts.json_files import read_object
from stagewise.artifacts.weight_files import ADAPTER, AGAIN, check_hashes, check_header
from stagewise.errors import AdapterError, FileError
from stagewise.models.hub import find_adapter_config

# peft_type in adapter_config.json -> --fine_tuning_type.
METHOD_OF = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
}


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """Reads adapter_config.json of a local directory.

    Raises:
        AdapterError: if there is none, its weights are missing, or a file is broken or is not what was saved.
    """
    folder = find_adapter_config(folder).parent
    try:
        kind = read_object(folder / "adapter_config.json", AGAIN).get("peft_type")
        if not isinstance(kind, str):
            raise FileError(f"{folder}/adapter_config.json: expected a text at peft_type, found {kind!r:.80}; {AGAIN}")
        for name in ADAPTER:
            if (folder / name).is_file():
                check_header(folder / name)
        check_hashes(folder)
    except FileError as error:
        raise AdapterError(str(error)) from error
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{folder}/adapter_config.json: not a config that PEFT reads ({error}); {AGAIN}") from error


def task_of(config: PeftConfig) -> str:
    """The task of an adapter: CAUSAL_LM, SEQ_CLS …; "None" if it is not given."""
    return str(getattr(config.task_type, "value", config.task_type))


def method_of(config: PeftConfig, folder: str | Path) -> str:
    """The --fine_tuning_type that made an adapter.

    Raises:
        AdapterError: for a kind of adapter that no stage trains.
    """
    kind = config.peft_type.value
    if kind not in METHOD_OF:
        raise AdapterError(
            f"--peft_path {folder}: a {kind} adapter; this version continues from {', '.join(METHOD_OF)} adapters"
        )
    return METHOD_OF[kind]


def tensor_names(folder: Path) -> list[str]:
    """The names of an adapter's weights; a .bin that contains more than tensors is refused."""
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as weights:
            return list(weights.keys())
    path = folder / "adapter_model.bin"
    try:
        return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(f"{path}: refused, not a plain file of tensors: {error}") from error


def refuse_unmergeable(config: PeftConfig, folder: str | Path) -> None:
    """Raises AdapterError for prompt, P- and prefix tuning, which add virtual tokens and change no weight."""
    if config.is_prompt_learning:
        raise AdapterError(
            f"{folder}: a {config.peft_type.value} adapter adds virtual tokens and cannot be merged; load it with "
            "PEFT beside its base: PeftModel.from_pretrained(base, adapter)"
        )
