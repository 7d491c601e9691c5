"""A model's tokenizer: loading it, and whether it belongs to the weights."""

from __future__ import annotations

from loguru import logger
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stagewise.arguments import ModelArguments
from stagewise.model_source import ModelError, find_source, hub_options, refuse_adapter


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of --tokenizer_name_or_path, else of --model_name_or_path.

    A tokenizer without a pad token gets its unknown token for it, else its end token; padding is never learned from,
    since collators mask it by length.

    Raises:
        ModelError: naming the flag.
    """
    flag = "tokenizer_name_or_path" if args.tokenizer_name_or_path else "model_name_or_path"
    source = find_source(args.tokenizer_name_or_path or args.model_name_or_path, args, flag)
    if flag == "model_name_or_path":
        refuse_adapter(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(source, args))
    except (OSError, ValueError) as error:
        raise ModelError(f"--{flag} {source}: no tokenizer could be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.unk_token or tokenizer.eos_token
        if substitute is None:
            raise ModelError(f"--{flag} {source}: the tokenizer names no pad, unknown or end token; add one to it")
        tokenizer.pad_token = substitute
        logger.info(f"tokenizer: it has no pad token; {substitute!r} pads")
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if the tokenizer has ids for which the model has no row."""
    rows = model.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} entries, the model's embedding {rows} rows: give the tokenizer that "
            "belongs to the model with --tokenizer_name_or_path"
        )
