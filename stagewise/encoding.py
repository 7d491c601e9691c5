"""Segments → token ids and labels: the only place that masks.

Each segment is encoded alone, so that the ids of a prompt are a prefix of the ids of the whole with any tokenizer.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from tqdm import tqdm

from stagewise.arguments import ArgumentError
from stagewise.cache import read_cache, write_cache
from stagewise.conversation import Conversation, Message, Preference, RecordError
from stagewise.records import Account, check_on_bad_record, write_rejected
from stagewise.rendering import Segment, Template, TokenizerTemplate, adds_bos

IGNORE_INDEX = -100
AnyTemplate = Template | TokenizerTemplate


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one length; a label is the token's own id, or −100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]
    where: str = "?"


@dataclass(frozen=True)
class PreferenceExample:
    """Two examples that begin with the same prompt tokens; the answers' tokens are labelled."""

    chosen: Example
    rejected: Example
    where: str = "?"


def encode_segments(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """(ids, labels) of the segments, each encoded alone; nothing is added that the segments don't say."""
    encoded = _encode_each(tokenizer, segments)
    ids = [token for piece in encoded for token in piece]
    labels = [
        token if segment.learn else IGNORE_INDEX
        for segment, piece in zip(segments, encoded, strict=True)
        for token in piece
    ]
    return ids, labels


def encode_conversation(
    tokenizer: Any,
    template: AnyTemplate,
    conversation: Conversation,
    max_length: int,
    train_on_inputs: bool = False,
) -> tuple[Example, bool]:
    """The conversation as an Example of at most `max_length` tokens, and whether it was cut.

    What is too long loses whole turns from its end; the first turn, when too long alone, is cut at the limit.
    Raises RecordError where nothing would be learned.
    """
    segments = template.segments(conversation)
    if not any(segment.learn for segment in segments):
        raise RecordError(conversation.where, "nothing learned", "the conversation holds no answer to learn from")
    encoded = _encode_each(tokenizer, segments)
    keep, length = _whole_turns(segments, encoded, max_length)
    ids, labels = [], []
    for segment, piece in zip(segments[:keep], encoded[:keep], strict=True):
        ids += piece
        labels += piece if segment.learn or train_on_inputs else [IGNORE_INDEX] * len(piece)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise RecordError(conversation.where, "nothing learned", f"the first question alone fills the limit of "
                          f"{max_length} tokens, no token of an answer is left; raise --model_max_length")  # fmt: skip
    cut = length > max_length or any(segment.learn or train_on_inputs for segment in segments[keep:])
    return Example(ids, labels, conversation.where), cut


def encode_prompt(
    tokenizer: Any, template: AnyTemplate, conversation: Conversation, max_source_length: int
) -> list[int]:
    """Ids up to where the assistant is to speak; earliest exchanges are dropped whole until they fit.

    Raises RecordError where the last question alone is longer than `max_source_length`.
    """
    return _fitting_prompt(tokenizer, template, conversation, max_source_length)[0]


def encode_preference(
    tokenizer: Any, template: AnyTemplate, preference: Preference, max_source_length: int, max_target_length: int
) -> tuple[PreferenceExample, bool]:
    """Both answers after the same prompt, each answer (with its end marker) at most `max_target_length` tokens.

    Returns whether an answer was cut or an exchange of the prompt dropped. Raises RecordError where both answers
    encode alike, or the last question is too long.
    """
    where = preference.where
    prompt_ids, prompt = _fitting_prompt(tokenizer, template, preference.prompt, max_source_length)
    cut = prompt.messages != preference.prompt.messages
    rows = []
    for answer in (preference.chosen, preference.rejected):
        whole = replace(prompt, messages=(*prompt.messages, Message("assistant", answer)))
        segments = template.segments(whole)
        last = max(number for number, segment in enumerate(segments) if segment.learn)
        encoded = _encode_each(tokenizer, segments[: last + 1])
        if [token for piece in encoded[:-1] for token in piece] != prompt_ids:
            raise RecordError(where, "inexact cut", "the prompt's tokens change when an answer follows")
        answer_ids = encoded[-1][:max_target_length]
        cut = cut or len(encoded[-1]) > max_target_length
        labels = [IGNORE_INDEX] * len(prompt_ids) + answer_ids
        rows.append(Example(prompt_ids + answer_ids, labels, where))
    if rows[0].input_ids == rows[1].input_ids:
        raise RecordError(where, "answers alike", f"both answers are the same {max_target_length} or fewer tokens; "
                          "raise --max_target_length if they differ later")  # fmt: skip
    return PreferenceExample(*rows, where), cut


def encode_text(tokenizer: Any, text: str, block_size: int, where: str = "?") -> list[Example]:
    """A document as examples of at most `block_size` tokens, all learned, the eos token at its end.

    It begins with a bos where the tokenizer adds one. A long document is cut; each block begins with the last token
    of the block before, since a row's first token is never predicted: so every token is learned exactly once.
    """
    if tokenizer.eos_token_id is None:
        raise ArgumentError("the tokenizer has no eos token to end a document with; set one in tokenizer_config.json")
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    if block_size < 2:
        raise ArgumentError(f"--block_size: a block needs at least 2 tokens, found {block_size}")
    starts = range(0, max(len(ids) - 1, 1), block_size - 1)
    blocks = [ids[begin : begin + block_size] for begin in starts]
    return [Example(block, list(block), where) for block in blocks]


def encode_all(
    records: Sequence[Any],
    encode: Callable[[Any], Any],
    *,
    account: Account,
    on_bad_record: str = "error",
    rejected_path: str | Path | None = None,
    num_workers: int | None = None,
    cache_file: str | Path | None = None,
    overwrite_cache: bool = False,
    description: str = "Encoding",
) -> list[Any]:
    """`encode(record)` of every record, with a progress bar on the main process, by `num_workers` processes.

    `encode` may return an Example, a PreferenceExample, a list of ids, any of these with a flag "cut" behind it, or
    a list of Examples, which are laid out flat. Records that raise RecordError leave `account.kept`, as in
    load_records. With `cache_file` (cache.cache_path names it by content) a second start reads the results.
    """
    check_on_bad_record(on_bad_record)
    if cache_file is not None and not overwrite_cache:
        cached = read_cache(cache_file)
        if cached is not None:
            results = _unflattened(*cached)
            _settle(account, cached[1]["cut"], cached[1]["left_out"])
            logger.info(f"{description}: {len(results)} read from {cache_file} (--overwrite_cache recomputes)")
            return results
    results, cut, left_out = [], 0, {}
    bar = tqdm(total=len(records), desc=description, disable=os.environ.get("RANK", "0") != "0", leave=False)
    with bar:
        for record, outcome in zip(records, _outcomes(records, encode, num_workers), strict=True):
            bar.update()
            if isinstance(outcome, RecordError):
                if on_bad_record == "error":
                    raise outcome
                left_out[outcome.reason] = left_out.get(outcome.reason, 0) + 1
                write_rejected(rejected_path, outcome, repr(record))
                continue
            results += outcome.examples
            cut += outcome.cut
    _settle(account, cut, left_out)
    if not results:
        raise ArgumentError(f"{description}: none of the {len(records)} records is left: {left_out}")
    if cache_file is not None and os.environ.get("RANK", "0") == "0":
        write_cache(cache_file, *_flattened(results, {"cut": cut, "left_out": left_out}))
    return results


# --- pieces ----------------------------------------------------------------------------------------------------------


def _encode_each(tokenizer: Any, segments: Sequence[Segment]) -> list[list[int]]:
    """The ids of each segment, encoded alone, but as the middle of a text.

    Tokenizers treat the start of a text in their own ways (SentencePiece puts a space before it), and some special
    tokens swallow the white space behind them. So each segment but the first is given with something in front that
    is taken off again: the special token that the segment before ends with, or, where a start is treated, a newline.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    newline, after_newline, alone = encode(["\n", "\na", "a"])
    start_is_treated = after_newline != newline + alone and after_newline[: len(newline)] == newline
    special = sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)
    texts = [segment.text for segment in segments]
    fronts = ["\n" if start_is_treated and number else "" for number in range(len(texts))]
    for number, text in enumerate(texts[:-1], 1):
        if text.endswith(tuple(special)):
            fronts[number] = next(token for token in special if text.endswith(token))
    front_ids = dict(zip(kinds := sorted({*fronts} - {""}), encode(kinds), strict=True)) | {"": []}
    encoded = encode([front + text for front, text in zip(fronts, texts, strict=True)])
    for number, (front, ids) in enumerate(zip(fronts, encoded, strict=True)):
        size = len(front_ids[front])
        encoded[number] = ids[size:] if ids[:size] == front_ids[front] else encode([texts[number]])[0]
    return encoded


def _whole_turns(segments: Sequence[Segment], encoded: list[list[int]], max_length: int) -> tuple[int, int]:
    """How many segments fit, ending with an answer unless all fit, at least the first answer; and their length."""
    keep = length = total = 0
    for number, (segment, piece) in enumerate(zip(segments, encoded, strict=True), 1):
        total += len(piece)
        if (segment.learn or number == len(segments)) and (total <= max_length or (segment.learn and not keep)):
            keep, length = number, total
        if total > max_length and keep:
            break
    return keep, length


def _fitting_prompt(
    tokenizer: Any, template: AnyTemplate, conversation: Conversation, limit: int
) -> tuple[list[int], Conversation]:
    messages = conversation.messages
    while True:
        prompt = replace(conversation, messages=messages)
        ids, _ = encode_segments(tokenizer, template.segments(prompt, generation=True))
        if len(ids) <= limit:
            return ids, prompt
        later = [number for number, message in enumerate(messages) if message.role == "user" and number > 0]
        if not later:
            raise RecordError(conversation.where, "prompt too long", f"the last question alone has {len(ids)} tokens, "
                              f"the limit is {limit}; raise --max_source_length")  # fmt: skip
        messages = messages[later[0] :]


class _Outcome(NamedTuple):
    examples: list[Any]
    cut: int


def _outcome(record: Any, encode: Callable[[Any], Any]) -> _Outcome | RecordError:
    """The result of one record in one shape; a RecordError is a result as well, for the caller to count."""
    try:
        result = encode(record)
    except RecordError as error:
        return error
    result, cut = result if isinstance(result, tuple) else (result, False)
    several = isinstance(result, list) and bool(result) and isinstance(result[0], Example)
    return _Outcome(result if several else [result], int(cut))


_WORKER_ENCODE: list[Callable[[Any], Any]] = []  # set once in each worker: a tokenizer is large to send each time


def _start_worker(encode: Callable[[Any], Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER_ENCODE[:] = [encode]


def _worker_outcome(record: Any) -> _Outcome | RecordError:
    return _outcome(record, _WORKER_ENCODE[0])


def _outcomes(
    records: Sequence[Any], encode: Callable[[Any], Any], num_workers: int | None
) -> Iterator[_Outcome | RecordError]:
    workers = min(num_workers or 1, len(records))
    if workers <= 1:
        yield from (_outcome(record, encode) for record in records)
        return
    # Forked workers start at once and take any `encode`; elsewhere it must be picklable.
    context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encode,)) as pool:
        yield from pool.map(_worker_outcome, records, chunksize=max(1, min(256, len(records) // (4 * workers))))


def _settle(account: Account, cut: int, left_out: dict[str, int]) -> None:
    account.cut += cut
    for reason, count in left_out.items():
        account.left_out[reason] = account.left_out.get(reason, 0) + count
        account.kept -= count


def _flattened(results: list[Any], account: dict[str, Any]) -> tuple[list[list[int]], dict[str, Any]]:
    """Results as plain rows of numbers and what is needed to make them again."""
    kind = type(results[0])
    if kind is list:
        return results, {"kind": "ids", **account}
    examples = results if kind is Example else [side for pair in results for side in (pair.chosen, pair.rejected)]
    rows = [row for example in examples for row in (example.input_ids, example.labels)]
    return rows, {"kind": kind.__name__, "wheres": [result.where for result in results], **account}


def _unflattened(rows: list[list[int]], about: dict[str, Any]) -> list[Any]:
    if about["kind"] == "ids":
        return rows
    wheres = about["wheres"]
    if about["kind"] == "Example":
        return [Example(*pair, where) for *pair, where in zip(rows[::2], rows[1::2], wheres, strict=True)]
    columns = zip(rows[::4], rows[1::4], rows[2::4], rows[3::4], wheres, strict=True)
    return [PreferenceExample(Example(a, b, where), Example(c, d, where), where) for a, b, c, d, where in columns]
