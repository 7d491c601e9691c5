r"""Adds a domain vocabulary, or a list of words, to a model: new pieces in its tokenizer, new rows in its weights.

    python -m tools.extend_vocabulary --model_name_or_path models/SmolLM2-135M-Instruct \
        --vocabulary outputs/vocabulary --output_dir outputs/extended --report_file data/pretrain/validation
    python -m tools.extend_vocabulary --model_name_or_path models/SmolLM2-135M-Instruct \
        --word_list words.txt --output_dir outputs/extended

Old ids do not change, new ones follow, and the same input gives the same ids. A new row, in the embedding and in the
head, is the mean of the rows of the pieces it replaces; tied weights stay tied. The result is a plain model directory:
train it with `pretraining.py --modules_to_save embed_tokens,lm_head`, since the new rows are untrained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stagewise.config.paths import name_of, path_of
from stagewise.training.first_look import look_at_models


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", type=name_of, required=True, help="model directory, or a hub name")
    parser.add_argument("--output_dir", type=path_of, help="where the extended model is written")
    parser.add_argument(
        "--vocabulary", type=path_of, help="directory of tools.build_tokenizer, or of any BPE or unigram tokenizer"
    )
    parser.add_argument("--word_list", type=path_of, help="text file, one word a line")
    parser.add_argument(
        "--leading_space",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether a listed word is the piece behind a space; auto: if its script puts spaces between words",
    )
    parser.add_argument("--max_new_pieces", type=int, help="add at most this many; default: all")
    parser.add_argument("--pad_to_multiple_of", type=int, help="rows of the embedding up to a multiple of this")
    parser.add_argument(
        "--report_file", type=path_of, help="held-out .txt or .jsonl text: tokens per 1,000 characters on it"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the report, load no weights, write nothing")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace what is at --output_dir")
    parser.add_argument("--cache_dir", type=path_of, help="where a hub model is cached")
    parser.add_argument("--model_revision", default="main", help="branch, tag or commit of a hub model")
    parser.add_argument("--hf_hub_token", help="token for a private hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model ships")
    return parser


if __name__ == "__main__":
    look_at_models(parser().parse_args())  # a wrong flag or model is answered before torch has loaded

import copy
import json
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from stagewise.artifacts.atomic_directory import atomic_directory, check_place
from stagewise.artifacts.lineage import carry_license
from stagewise.artifacts.manifest import read_manifest, write_manifest
from stagewise.config.arguments import ModelArguments
from stagewise.errors import ArgumentError, VocabularyError
from stagewise.models.config import load_config
from stagewise.models.hub import find_source, hub_options, refuse_adapter
from stagewise.models.loading import load_causal_lm
from stagewise.models.tokenizer import open_tokenizer
from stagewise.reports.model_card import public_name
from stagewise.reports.terminal_text import log_visible_text, print_error, visible
from stagewise.tokenizer.extend import Extension, extend
from stagewise.tokenizer.vocabulary_files import read_pieces, read_texts, read_words

# Scripts that are written without spaces: a word of theirs stands inside a text, not behind a space.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
PROBES = (
    "The quick brown fox, 42 times.\n\n  def add(a, b):\n\treturn a + b  # 你好,世界!",
    "Ärzte, naïve café; Привет; こんにちは; مرحبا; 👩‍⚕️\r\n<|unknown|>",
)


# ── the tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer.

    Raises:
        ModelError: if there is none that can be loaded.
        VocabularyError: if it has no tokenizer.json.
    """
    source = find_source(args.model_name_or_path, args)
    refuse_adapter(source)
    tokenizer = open_tokenizer(source, "model_name_or_path", hub_options(source, args))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise VocabularyError(
            f"--model_name_or_path {source}: {type(tokenizer).__name__} has no tokenizer.json form, and only that can "
            "be extended"
        )
    return tokenizer


def placed(word: str, leading_space: str) -> str:
    """A listed word as it occurs in a text: after a space, or not."""
    if leading_space == "auto":
        spaced = word[0].isalpha() and not unicodedata.name(word[0], "").startswith(UNSPACED)
        return f" {word}" if spaced else word
    return f" {word}" if leading_space == "always" else word


def wanted(args: argparse.Namespace) -> list[str]:
    """The texts to add as pieces, the vocabulary's first; listed words by length, so that parts come first."""
    texts = read_pieces(args.vocabulary) if args.vocabulary else []
    if args.word_list:
        texts += sorted((placed(word, args.leading_space) for word in read_words(args.word_list)), key=len)
    return list(dict.fromkeys(texts))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def check_unchanged(before: Tokenizer, after: Tokenizer, extension: Extension, texts: Sequence[str]) -> None:
    """Checks that old pieces keep their ids, and that texts without new pieces are encoded as before.

    Raises:
        VocabularyError: if that does not hold.
    """
    old, now = before.get_vocab(), after.get_vocab()
    moved = [piece for piece, number in old.items() if now.get(piece) != number]
    if moved:
        raise VocabularyError(f"{len(moved)} old pieces have another id now, {moved[0]!r} among them: nothing written")
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    for line in lines:
        ids = ids_of(after, line)
        if extension.replaced.keys().isdisjoint(ids) and ids != ids_of(before, line):
            raise VocabularyError(f"{line[:60]!r} has no new piece and is encoded in another way: nothing written")


def report(before: Tokenizer, after: Tokenizer, extension: Extension, texts: Sequence[str]) -> dict[str, Any]:
    """Tokens per 1,000 characters before and after, and the use of the new pieces, on a held-out text."""
    characters, was, now, met = sum(map(len, texts)), 0, 0, []
    for text in texts:
        ids = ids_of(after, text)
        was += len(ids_of(before, text))
        now += len(ids)
        met += [number for number in ids if number in extension.replaced]
        if round_trip(before, text) and not round_trip(after, text):
            raise VocabularyError("--report_file: a text no longer comes back from its ids: nothing was written")
    return {
        "characters": characters,
        "tokens_before": was,
        "tokens_after": now,
        "per_1000_before": round(1000 * was / characters, 1),
        "per_1000_after": round(1000 * now / characters, 1),
        "new_pieces_met": len(set(met)),
        "share_of_tokens_new": round(len(met) / now, 4),
    }


def round_trip(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False) == text


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, folder: Path, texts: Sequence[str]) -> None:
    """Writes the tokenizer with the new backend and loads it again like the stages do.

    Raises:
        VocabularyError: if the loaded one differs.
    """
    tokenizer.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same = again.get_vocab() == backend.get_vocab(with_added_tokens=True)
    if not same or any(ids_of(again.backend_tokenizer, text) != ids_of(backend, text) for text in texts):
        raise VocabularyError(
            f"{type(again).__name__} reads the extended tokenizer.json in another way than it is written: its kind "
            "of tokenizer cannot be extended here"
        )


# ── the weights ─────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_needed(rows: int, highest_id: int, multiple: int | None) -> int:
    """The number of rows of the embedding: the existing ones or those the ids need, rounded up if requested."""
    needed = max(rows, highest_id + 1)
    return needed if multiple is None else -(-needed // multiple) * multiple


def grow(model: PreTrainedModel, replaced: dict[int, list[int]], rows: int, highest_old_id: int) -> None:
    """Resizes embedding and head to `rows` rows; a new piece's row is the mean of the rows it replaces, in place.

    Rows that no id uses are the mean of all old ones. Embedding and head: (rows, H), the head's bias: (rows,).

    Raises:
        VocabularyError: if ids have no row, or another embedding also has a row for each id.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    old = embedding.weight.shape[0]
    if highest_old_id >= old:
        raise VocabularyError(f"--model_name_or_path: its tokenizer has id {highest_old_id}, its embedding {old} rows")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not embedding and len(module.weight) == old:
            raise VocabularyError(f"--model_name_or_path: {name} has a row for each id as well; it cannot be extended")
    tied = head is not None and head.weight is embedding.weight
    if rows > old:
        model.resize_token_embeddings(rows, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and head.weight is not embedding.weight:
        raise VocabularyError("--model_name_or_path: growing the embedding broke its tie to the head")
    modules = [module for module in (embedding, head) if module is not None]
    with torch.no_grad():
        for weight in {id(p): p for module in modules for p in module.parameters()}.values():
            before = weight[: highest_old_id + 1].float()
            weight[old:] = before.mean(dim=0).to(weight.dtype)
            for number, ids in replaced.items():
                weight[number] = before[ids].mean(dim=0).to(weight.dtype)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check(args: argparse.Namespace) -> None:
    """Raises ArgumentError for flags that do not fit together, before anything is read."""
    if not args.vocabulary and not args.word_list:
        raise VocabularyError("nothing to add: give --vocabulary DIRECTORY, --word_list FILE, or both")
    if args.leading_space != "auto" and not args.word_list:
        raise VocabularyError("--leading_space has no effect without --word_list: leave it out")
    for name in ("max_new_pieces", "pad_to_multiple_of"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise VocabularyError(f"--{name}: expected at least 1, found {value}")
    if args.dry_run:
        return
    if args.output_dir is None:
        raise VocabularyError("--output_dir is missing: give a directory, or --dry_run to see the report alone")
    check_place(args.output_dir, args.overwrite_output_dir, read_by(args))


def read_by(args: argparse.Namespace) -> dict[str, str | None]:
    return {flag: getattr(args, flag) for flag in ("model_name_or_path", "vocabulary", "word_list", "report_file")}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extends tokenizer and model and writes --output_dir; returns the numbers for run.json.

    Raises:
        ArgumentError: with the flag; nothing is written then.
    """
    check(args)
    model_args = ModelArguments(
        args.model_name_or_path,
        cache_dir=args.cache_dir,
        model_revision=args.model_revision,
        hf_hub_token=args.hf_hub_token,
        trust_remote_code=args.trust_remote_code,
    )
    config = load_config(model_args)
    if getattr(config, "quantization_config", None):
        raise VocabularyError(
            f"--model_name_or_path {args.model_name_or_path}: its weights are quantized; give the 16-bit original"
        )
    tokenizer = load_tokenizer(model_args)
    texts = read_texts(args.report_file, "report_file") if args.report_file else []
    before = copy.deepcopy(tokenizer.backend_tokenizer)
    before.no_truncation()
    before.no_padding()
    extension = extend(json.loads(before.to_str()), wanted(args), args.max_new_pieces)
    if not extension.new:
        raise VocabularyError(f"nothing to add: {told_left_out(extension) or 'there are no pieces in it'}")
    after = Tokenizer.from_str(json.dumps(extension.data))
    check_unchanged(before, after, extension, [*PROBES, *texts])
    found: dict[str, Any] = {
        "new_pieces": len(extension.new),
        "parts": len(extension.parts),
        "first_new_id": min(extension.replaced),
        "left_out": {reason: len(pieces) for reason, pieces in extension.left_out.items()},
        "rows": rows_needed(config.get_text_config().vocab_size, max(extension.replaced), args.pad_to_multiple_of),
    }
    if texts:
        found["report"] = report(before, after, extension, texts)
    if not args.dry_run:
        write(args, model_args, tokenizer, after, extension, found, [*PROBES, *texts])
    return found | {"left_out_words": told_left_out(extension)}


def write(
    args: argparse.Namespace,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    after: Tokenizer,
    extension: Extension,
    found: dict[str, Any],
    texts: Sequence[str],
) -> None:
    """Writes the model directory, completely or not at all."""
    with atomic_directory(args.output_dir, args.overwrite_output_dir) as folder:
        save_tokenizer(tokenizer, after, folder, texts)
        model = load_causal_lm(model_args, for_training=False)
        found["rows"] = rows_needed(
            model.get_input_embeddings().weight.shape[0], max(extension.replaced), args.pad_to_multiple_of
        )
        grow(model, extension.replaced, found["rows"], min(extension.replaced) - 1)
        model.save_pretrained(folder)
        base = read_manifest(args.model_name_or_path) or {}
        step = {"stage": "vocabulary", "base_model": str(args.model_name_or_path)}
        manifest = {**step, "status": "finished", "lineage": [*base.get("lineage", []), step]}
        manifest |= {"template": base.get("template"), "vocabulary": found}
        if (source := Path(args.model_name_or_path)).is_dir():  # of a hub's model only what loads is here
            manifest["license"] = carry_license(source, folder, public_name(args.model_name_or_path))
        write_manifest(folder, manifest, weights=True)


def told_left_out(extension: Extension) -> str:
    """Which pieces were not added and why, with the first few."""
    return "; ".join(
        f"{len(pieces):,} {reason} ({', '.join(repr(piece) for piece in pieces[:3])}{' …' if len(pieces) > 3 else ''})"
        for reason, pieces in extension.left_out.items()
    )


def told(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """A summary for a person."""
    lines = [
        f"{found['new_pieces']:,} new pieces from id {found['first_new_id']:,}, and {found['parts']:,} parts that "
        f"their merges pass through; {found['rows']:,} rows",
        "a text that holds none of them is encoded as before",
    ]
    if found["left_out_words"]:
        lines.append(f"not added: {found['left_out_words']}")
    if numbers := found.get("report"):
        times = numbers["tokens_before"] / numbers["tokens_after"]
        lines += [
            f"{args.report_file}: {numbers['characters']:,} characters; {numbers['new_pieces_met']:,} new pieces "
            f"occur in it and are {numbers['share_of_tokens_new']:.0%} of its tokens",
            f"tokens per 1,000 characters: {numbers['per_1000_before']:,} before, {numbers['per_1000_after']:,} after "
            f"({times:.2f} times fewer)",
        ]
    where = "nothing was written (--dry_run)" if args.dry_run else f"{args.output_dir}"
    return "\n".join([*lines, where])


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        print(visible(told(args, run(args))))
    except ArgumentError as error:
        print_error(error)
        sys.exit(1)


if __name__ == "__main__":
    logger.remove()
    log_visible_text()
    logger.add(sys.stderr, format="<green>{time:HH:mm:ss}</green> <level>{message}</level>")
    transformers_logging.set_verbosity_error()
    main()
