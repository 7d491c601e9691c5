"""Finding a model: a local directory, a Hugging Face hub or mirror, or ModelScope."""

from __future__ import annotations

import difflib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loguru import logger
from packaging.version import Version

from stagewise.config.arguments import ModelArguments
from stagewise.errors import AdapterError, ModelError

TRANSFORMERS = version("transformers")
# The lower bound of requirements.txt: before it, names and defaults of loading differ.
if Version(TRANSFORMERS) < Version("5.17"):
    raise ImportError(f"transformers {TRANSFORMERS} is too old: pip install 'transformers>=5.17'")

MODELSCOPE_PREFIX = "modelscope://"
# Errors of the hub's client, by name: its classes moved between supported versions.
NOT_FOUND = {"RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"}
NOT_REACHED = {"ConnectError", "ConnectionError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
LOCAL_FOLDERS = ("models", "outputs")

ANOTHER = "a model that transformers has a class for, such as Qwen3, Llama or GLM-4"
# model_type of families whose published code needs names that transformers 5 removed -> their name,
# and what to use instead.
REFUSED_FAMILIES = {
    "aquila": ("Aquila", ANOTHER),
    "baichuan": ("Baichuan", ANOTHER),
    "chatglm": ("ChatGLM", "GLM-4 in transformers' own form (zai-org/glm-4-9b-chat-hf) or a later GLM"),
    "internlm": ("InternLM 1", "InternLM3"),
    "internlm2": ("InternLM 2", "InternLM3"),
    "moss": ("MOSS", ANOTHER),
    "orion": ("Orion", ANOTHER),
    "qwen": ("Qwen 1", "Qwen1.5, Qwen2, Qwen2.5 or Qwen3"),
    "xverse": ("XVERSE", ANOTHER),
}


def find_source(name: str, args: ModelArguments, flag: str = "model_name_or_path") -> str:
    """Returns a local directory, or a hub name for the hub's own client (which supports HF_ENDPOINT mirrors).

    A name with the prefix `modelscope://`, or any hub name if USE_MODELSCOPE_HUB=1, is downloaded from ModelScope.

    Raises:
        ModelError: for a missing directory, an adapter directory, or ModelScope without its package.
    """
    if folder := local_source(name, flag):
        return folder
    if _from_modelscope(name):
        return _download_modelscope(name.removeprefix(MODELSCOPE_PREFIX), args, flag)
    return name


def local_source(name: str, flag: str) -> str | None:
    """The local directory that a flag names; None for a hub name. Raises ModelError if it does not exist."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelError(f"--{flag} {name}: expected a directory with config.json, found a file")
    if _from_modelscope(name):
        return None
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or _is_in_local_folder(path):
        raise ModelError(f"--{flag} {name}: no such directory{_similar_names(path)}")
    return None


def _is_in_local_folder(path: Path) -> bool:
    """Whether a missing path of the form folder/name means a path and not a hub name.

    A folder of hub downloads may be named like an organization, so a folder counts only if runs were written to it, or
    if it has one of the two names that the recipes use.
    """
    folder = path.parent
    return len(path.parts) == 2 and (str(folder) in LOCAL_FOLDERS or any(folder.glob("*/run.json")))


def _similar_names(path: Path) -> str:
    """The end of an error about a missing directory: similar names beside it; "" if there are none."""
    if not path.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; {path.parent} holds {', '.join(similar)}" if similar else ""


def no_hub_model(error: BaseException) -> str:
    """Why a name led to no model or adapter, in one sentence; the library's own error names the cause at its end."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    cause: BaseException | None = error
    while cause is not None:
        kind = type(cause).__name__
        if kind in NOT_FOUND:
            return f"no such directory, and {hub} has no such model that this account may read"
        if kind in NOT_REACHED:
            return f"no such directory, and no hub model was found: {hub} was not reached and the cache has none"
        cause = cause.__cause__ or cause.__context__
    return f"no such directory, and no hub model was found ({' '.join(str(error).split())})"


def _from_modelscope(name: str) -> bool:
    wanted = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes", "on")
    return name.startswith(MODELSCOPE_PREFIX) or (wanted and name.count("/") == 1)


def refuse_family(source: str, flag: str = "model_name_or_path") -> None:
    """Raises ModelError if a local config.json is of a family that no current transformers runs.

    An unreadable config.json is ignored here; loading it reports the error.
    """
    try:
        kind = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    check_family(kind, source, flag)


def check_family(model_type: Any, source: str, flag: str = "model_name_or_path") -> None:
    """Raises ModelError, with an alternative, for a family in REFUSED_FAMILIES."""
    if (kind := str(model_type).lower()) in REFUSED_FAMILIES:
        name, instead = REFUSED_FAMILIES[kind]
        raise ModelError(
            f"--{flag} {source}: {name} models ship Python code that transformers {TRANSFORMERS} cannot run; "
            f"take {instead}"
        )


def _download_modelscope(name: str, args: ModelArguments, flag: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"--{flag} {name}: ModelScope was asked for; its package is missing: pip install modelscope"
        ) from error
    revision = None if args.model_revision == "main" else args.model_revision  # ModelScope's own default is "master"
    logger.info(f"model: {name} from ModelScope")
    return snapshot_download(name, cache_dir=args.cache_dir, revision=revision)


def hub_options(source: str, args: ModelArguments) -> dict[str, Any]:
    """Keyword arguments of from_pretrained; for a local directory no hub is contacted."""
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if Path(source).is_dir():
        return {**options, "local_files_only": True}
    return {**options, "revision": args.model_revision, "token": args.hf_hub_token, "cache_dir": args.cache_dir}


def refuse_adapter(source: str, flag: str = "model_name_or_path") -> None:
    """Raises ModelError, with the merge command, if `source` is an adapter's directory."""
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"--{flag} {source}: this is an adapter, not a model. Merge it first: "
            f"python merge_peft_adapter.py --lora_model {source} --output_dir {str(folder).rstrip('/')}-merged"
        )


def find_adapter_config(folder: str | Path) -> Path:
    """adapter_config.json of a local adapter.

    Raises:
        AdapterError: there is none, or the adapter has no weights.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder}: expected an adapter, found no adapter_config.json")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterError(f"{folder}: the adapter has no adapter_model.safetensors (or .bin)")
    return folder / "adapter_config.json"


def check_adapter(name: str, flag: str) -> None:
    """Raises an ArgumentError that names the flag for a local adapter that is missing or has no config or weights."""
    folder = local_source(name, flag)
    if folder is None:
        return
    try:
        find_adapter_config(folder)
    except AdapterError as error:
        raise AdapterError(f"--{flag} {error}") from error
