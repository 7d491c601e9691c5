"""The rows of a reward model: a conversation as one text that ends with the end marker, where the score is read.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>
                                                                 └── score

transformers reads a classifier's score at the last token of a row that is not the config's pad token, servers read it
at the last token. Both are the end marker if the pad token never ends a row and the chat template writes nothing after
the marker. So a reward model gets its own pad token and template ending, saved with its tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from tokenizers import AddedToken

from stagewise.artifacts.json_files import read_object
from stagewise.chat.jinja import quoted
from stagewise.errors import ArgumentError

TRAINED_IN = "stagewise_template"  # in tokenizer_config.json: the name of the template that the model was trained with
SCORED_AT = "stagewise_scored_at"  # in tokenizer_config.json of a reward model: the end marker of its rows
PAD_NAME = re.compile(r"\W*(finetune_right_)?pad(ding)?(_id)?\W*", re.IGNORECASE)
SPARE_NAME = re.compile(r"reserved|unused|extra_id|dummy", re.IGNORECASE)
# multimodal models look for these in their input
MEDIA_NAME = re.compile(r"image|vision|video|audio|speech", re.IGNORECASE)
WAY_OUT = "get the model's directory again, whole"
NEW_PAD = "<|pad|>"
OPENING, CLOSING = "{% set chat_row +%}", "{%+ endset %}"
ENDING = (
    '{{{{ chat_row.removesuffix({}) if messages and messages[-1]["role"] == "assistant" and not add_generation_prompt '
    "else chat_row }}}}"
)


class Ending(NamedTuple):
    """How the rows of a reward model end: `closing` ends an answer, `tail` is what the template writes after it."""

    closing: str
    tail: str


class Reading(Enum):
    """The rows that a classifier was trained on.

    MARKED: those of this module. OLDER: those of earlier versions: segments encoded separately, the row ended with the
    end marker, and the score was read one token earlier if the end marker is also the pad token. PLAIN: made
    elsewhere, with whatever its tokenizer's chat template writes.
    """

    MARKED = "marked"
    OLDER = "older"
    PLAIN = "plain"


def reading_of(tokenizer: Any, name: str | Path) -> Reading:
    """The rows that the classifier `name` (a directory or hub name) was trained on; to be called before
    `choose_template`.
    """
    return _reading(tokenizer.init_kwargs, Path(name))


def saved_reading(folder: str | Path) -> Reading:
    """The same, from the files of a directory only."""
    path = Path(folder) / "tokenizer_config.json"
    return _reading(read_object(path, WAY_OUT) if path.is_file() else {}, Path(folder))


def is_older_reward_model(folder: str | Path) -> bool:
    """Whether a directory holds a reward model, or the adapter of one, whose rows are OLDER."""
    files = [Path(folder) / name for name in ("adapter_config.json", "config.json")]
    found = [read_object(path, WAY_OUT) for path in files if path.is_file()]
    scores = any(
        config.get("task_type") == "SEQ_CLS"
        or any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
        for config in found
    )
    return scores and saved_reading(folder) is Reading.OLDER


def older_notice(name: str | Path, tokenizer: Any, template: Any) -> str:
    """The warning for a reward model whose rows are OLDER.

    Args:
        name: the model's directory or hub name.
        tokenizer: as saved with the model.
        template: the chat template, bound to the tokenizer.
    """
    stop, tail = template.stop, template.tail
    if tokenizer.pad_token == stop:
        differs = f"its score is read at the token before the end marker {stop!r}, which is its pad token, too"
    elif tail:
        differs = f"its score is read at the end marker {stop!r}, behind which its chat template writes {tail!r}"
    else:
        differs = "the pieces of its rows were encoded one by one, which chat templates elsewhere do not do"
    return (
        f"reward model {name}: from an older version: {differs}; other programs may score otherwise. To fix it, train "
        "it for some more steps (reward_modeling.py --peft_path ADAPTER, or --model_name_or_path MERGED), merge again"
    )


def settle_reward_form(tokenizer: Any, template: Any, rows: int) -> Ending:
    """Sets what a reward model's tokenizer is saved with: pad token, chat template, and a note of both.

    Args:
        tokenizer: of the reward model; changed.
        template: the chat template, bound to it.
        rows: of the model's embedding.

    Raises:
        ArgumentError: no token is suited for padding.
    """
    stops = {tokenizer.encode(stop, add_special_tokens=False)[-1] for stop in template.stops}
    set_pad_token(tokenizer, stops, rows)
    tokenizer.chat_template = ending_at_marker(template.jinja(), template.tail)
    tokenizer.init_kwargs[SCORED_AT] = template.stop
    return Ending(template.closing, "")


def set_pad_token(tokenizer: Any, ends: set[int], rows: int) -> None:
    """Sets a pad token that has an embedding and ends no row of a reward model; the current one if possible.

    The embedding does not grow. Raises ArgumentError if there is no such token.
    """
    for token in _pad_candidates(tokenizer, rows):
        number = tokenizer.convert_tokens_to_ids(token)
        if token == NEW_PAD or (number is not None and number not in ends and number < rows):
            break
    else:
        raise ArgumentError(
            "the tokenizer has no token besides the end marker that a reward model could be padded with; name a "
            "pad_token in its tokenizer_config.json"
        )
    if token != tokenizer.pad_token:
        before = tokenizer.pad_token
        tokenizer.add_special_tokens({"pad_token": AddedToken(token, special=True, normalized=False)})
        logger.info(f"tokenizer: {token!r} pads in place of {before!r}, so that the score is read at the end marker")


def ending_at_marker(chat_template: str, tail: str) -> str:
    """The chat template without `tail` after a last answer; other conversations render as before."""
    if not tail:
        return chat_template
    # Jinja drops one newline at the end of a template, which would no longer be the end
    return f"{OPENING}{chat_template.removesuffix(chr(10))}{CLOSING}{ENDING.format(quoted(tail))}"


def without_ending(chat_template: str) -> str:
    """The original template of `ending_at_marker`, or the text itself."""
    before, after = (re.escape(part) for part in ENDING.format("\0").split("\0"))
    pattern = f'{re.escape(OPENING)}(.*){re.escape(CLOSING)}{before}"(?:[^"\\\\]|\\\\.)*"{after}'
    found = re.fullmatch(pattern, chat_template, re.DOTALL)
    return found[1] if found else chat_template


def carry_reward_form(tokenizer: Any, own: Any) -> bool:
    """Copies the settings of a reward model's tokenizer to another one; False if that lacks the pad token."""
    if tokenizer.convert_tokens_to_ids(own.pad_token) != own.pad_token_id:
        return False
    tokenizer.add_special_tokens({"pad_token": own.pad_token})
    tokenizer.chat_template = own.chat_template
    kept = (TRAINED_IN, SCORED_AT)
    tokenizer.init_kwargs.update({name: own.init_kwargs[name] for name in kept if name in own.init_kwargs})
    return True


def _reading(saved: Mapping[str, Any], folder: Path) -> Reading:
    if SCORED_AT in saved:
        return Reading.MARKED
    # A tokenizer keeps the note of its template even if others train a classifier on a model of this project.
    accounts = [folder / "run.json", folder.parent / "run.json"]
    made_here = TRAINED_IN in saved and (not folder.is_dir() or any(path.is_file() for path in accounts))
    return Reading.OLDER if made_here else Reading.PLAIN


def _pad_candidates(tokenizer: Any, rows: int) -> Iterator[str]:
    """Tokens suited for padding, best first; each occurs in no text, or stands for itself."""
    if tokenizer.pad_token is not None:
        yield tokenizer.pad_token
    added = [token for token, _ in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])]
    yield from filter(PAD_NAME.fullmatch, added)
    if tokenizer.unk_token is not None:
        yield tokenizer.unk_token
    yield from filter(SPARE_NAME.search, added)
    if NEW_PAD not in added and len(tokenizer) < rows:
        yield NEW_PAD
    yield from (token for token in added if token.strip() and not MEDIA_NAME.search(token))
    # A byte-level token whose spelling occurs in no text: "Ġcured" stands for " cured".
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1]):
        if len(token) > 2 and tokenizer.convert_tokens_to_string([token]) != token:
            yield token
