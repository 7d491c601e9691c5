"""A model's tokenizer: loading it, and checking that it fits the weights."""

from __future__ import annotations

from typing import Any

from loguru import logger
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from stagewise.artifacts.json_files import inside, read_object
from stagewise.artifacts.weight_files import AGAIN
from stagewise.config.arguments import ModelArguments
from stagewise.errors import ModelError
from stagewise.models.config import own_code
from stagewise.models.hub import find_source, hub_options, refuse_adapter, refuse_family

# many published tokenizers contain the path of the machine they were made on
NOT_OPENED = ("special_tokens_map_file",)
MAY_BE_MISSING = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of --tokenizer_name_or_path, else of --model_name_or_path.

    A tokenizer without a pad token uses its unknown token, else its end token; padding never has labels, since
    collators mask it by length.

    Raises:
        ModelError: naming the flag.
    """
    flag = "tokenizer_name_or_path" if args.tokenizer_name_or_path else "model_name_or_path"
    source = find_source(args.tokenizer_name_or_path or args.model_name_or_path, args, flag)
    if flag == "model_name_or_path":
        refuse_adapter(source)
        refuse_family(source)
    tokenizer = open_tokenizer(source, flag, hub_options(source, args))
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.unk_token or tokenizer.eos_token
        if substitute is None:
            raise ModelError(f"--{flag} {source}: the tokenizer names no pad, unknown or end token; add one to it")
        tokenizer.pad_token = substitute
        logger.info(f"tokenizer: it has no pad token; {substitute!r} pads")
    return tokenizer


def open_tokenizer(source: str, flag: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer after checking its files.

    Args:
        source: a directory, or a hub name.
        flag: the flag that named it.
        options: for from_pretrained.

    Raises:
        FileError: one of its files is broken, or names others that are not below its directory.
        ModelError: there is none, or none that can be loaded.
    """
    check_tokenizer_files(source, options)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except MemoryError:
        raise
    except Exception as error:  # the Rust library raises nothing more specific
        if needed := own_code(source, options, flag):
            raise needed from error
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"--{flag} {source}: no tokenizer could be loaded: {said}") from error


def check_tokenizer_files(source: str, options: dict[str, Any]) -> None:
    """Raises FileError for a JSON file that is broken, or that names a file elsewhere.

    transformers opens files that they name, and copies some beside what it saves.
    """
    wanted = {name: value for name, value in options.items() if name != "trust_remote_code"}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"):
        found = cached_file(source, name, **wanted, **MAY_BE_MISSING)
        about = read_object(found, AGAIN) if found else {}
        if name == "tokenizer.json":
            continue
        named = [value for key, value in about.items() if key.endswith("_file") and key not in NOT_OPENED]
        for value in (*named, *_listed(about.get("fast_tokenizer_files"))):
            if isinstance(value, str):
                inside(source, value, found)
        for template in _listed(about.get("chat_template")):
            if isinstance(template, dict):  # each is saved in a file of its name
                inside(source, template.get("name"), found)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if the tokenizer has ids without a row in the embedding."""
    rows = model.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} entries, the model's embedding {rows} rows: give the tokenizer that "
            "belongs to the model with --tokenizer_name_or_path"
        )
