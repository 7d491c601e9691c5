r"""Builds a domain vocabulary from text files: a tokenizer that `tools.extend_vocabulary` merges into a model's.

    python -m tools.build_tokenizer --text_dir data/pretrain/train --output_dir outputs/vocabulary --vocab_size 2000
    python -m tools.build_tokenizer --text_dir data/pretrain/train --output_dir outputs/unigram --vocab_size 2000 \
        --kind unigram

Text is not normalized; spaces are ▁, punctuation and digits are separate pieces, and a character outside the
vocabulary is written in bytes, so every text can be decoded exactly. The same files give the same vocabulary. The
directory has tokenizer.json, with sentencepiece also tokenizer.model, and loads with AutoTokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from loguru import logger
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from stagewise.artifacts.atomic_directory import atomic_directory, check_place
from stagewise.config.paths import path_of
from stagewise.errors import ArgumentError, VocabularyError
from stagewise.reports.terminal_text import print_error
from stagewise.tokenizer.vocabulary_files import SPACE, read_texts

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
SMALLEST = len(SPECIAL) + len(BYTE_PIECES) + 1
KINDS = ("bpe", "unigram")
LIBRARIES = ("tokenizers", "sentencepiece")
LONGEST_LINE = 4000  # letters; what is longer is cut, since sentencepiece skips long sentences


def choose_library(kind: str, asked: str | None) -> str:
    """`tokenizers` for BPE and `sentencepiece` for unigram, unless --library is given.

    Raises:
        VocabularyError: for a unigram with `tokenizers`, whose result differs from run to run.
    """
    if kind == "unigram" and asked == "tokenizers":
        raise VocabularyError(
            "--library tokenizers --kind unigram: its trainer gives another vocabulary in every run; use --library "
            "sentencepiece, or --kind bpe"
        )
    return asked or ("tokenizers" if kind == "bpe" else "sentencepiece")


def lines_of(texts: Sequence[str]) -> Iterator[str]:
    """The training lines, without empty ones and none longer than LONGEST_LINE."""
    for text in texts:
        for line in text.replace("\0", "").splitlines():
            for start in range(0, len(line), LONGEST_LINE):
                if line[start : start + LONGEST_LINE].strip():
                    yield line[start : start + LONGEST_LINE]


def letters_kept(lines: Sequence[str], coverage: float) -> list[str]:
    """The characters that cover this share of a text: the most frequent first, ties in order of the characters."""
    counts = Counter(letter for line in lines for letter in line if not letter.isspace())
    left, kept = coverage * sum(counts.values()), []
    for letter, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        kept.append(letter)
        left -= count
        if left <= 0:
            break
    return kept


def cutting() -> pre_tokenizers.PreTokenizer:
    """Words with the space before them; punctuation and digits separately, as in most models' tokenizers."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Split(Regex(r"[\p{P}\p{S}]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )


def with_tokenizers(lines: Sequence[str], args: argparse.Namespace) -> tuple[Tokenizer, None]:
    """BPE over characters.

    Raises:
        VocabularyError: if the characters alone fill --vocab_size: its trainer would exceed it and merge nothing.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = cutting()
    alphabet = [SPACE, *letters_kept(lines, args.character_coverage)]
    if (least := len(SPECIAL) + len(BYTE_PIECES) + len(alphabet)) >= args.vocab_size:
        raise VocabularyError(
            f"--vocab_size {args.vocab_size}: the special and byte pieces and the {len(alphabet):,} characters that "
            f"--character_coverage {args.character_coverage:g} keeps are {least:,} already, and no characters would "
            "be joined; give a larger size, or a lower coverage"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        # The limit alone would leave it to chance which of two letters as rare as each other is kept.
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=args.max_piece_length,
        special_tokens=[*SPECIAL, *BYTE_PIECES],
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    # Byte pieces were special for the trainer only: as added tokens they would be taken out of a text.
    learned = models.BPE(
        vocab=tokenizer.get_vocab(with_added_tokens=False),
        merges=_merges_of(tokenizer),
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    return finished(learned, cutting()), None


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def with_sentencepiece(lines: Sequence[str], args: argparse.Namespace) -> tuple[Tokenizer, bytes]:
    """BPE or unigram; also written as tokenizer.model.

    Raises:
        VocabularyError: if sentencepiece cannot train on this text.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=args.kind,
            vocab_size=args.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=args.character_coverage,
            max_sentencepiece_length=args.max_piece_length,
            max_sentence_length=4 * LONGEST_LINE,  # bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            num_threads=1,  # with more the sums are in another order
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise VocabularyError(f"--vocab_size {args.vocab_size}: sentencepiece cannot build it: {error}") from error
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [(model.id_to_piece(number), model.get_score(number)) for number in range(len(model))]
    # No piece crosses a space. SentencePiece never looks a byte piece up in a text: a written "<0x41>" is cut first.
    cut = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    cut = pre_tokenizers.Sequence([cut, pre_tokenizers.Metaspace(prepend_scheme="never")])
    if args.kind == "unigram":
        return finished(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True), cut), written.getvalue()
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    learned = models.BPE(
        vocab=vocab, merges=merges_by_score(pieces), unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    return finished(learned, cut), written.getvalue()


def merges_by_score(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE: every pair whose concatenation is a piece, the highest score first."""
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    ranked = sorted((piece for piece in pieces if len(piece[0]) > 1), key=lambda piece: -piece[1])
    special = {*SPECIAL, *BYTE_PIECES}
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        if piece not in special
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def finished(model: models.Model, cut: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A tokenizer around a trained model: ▁ for spaces, no prefix, bytes joined when decoding."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the vocabulary and writes --output_dir; returns its numbers.

    Raises:
        ArgumentError: naming the flag, before anything is written.
    """
    check(args)
    library = choose_library(args.kind, args.library)
    lines = list(lines_of(read_texts(args.text_dir, "text_dir")))
    tokenizer, model = (with_tokenizers if library == "tokenizers" else with_sentencepiece)(lines, args)
    with atomic_directory(args.output_dir, args.overwrite_output_dir) as folder:
        from transformers import PreTrainedTokenizerFast

        named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
        if model is not None:
            (folder / "tokenizer.model").write_bytes(model)
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        logger.info(f"--vocab_size {args.vocab_size}: the text gives {size} pieces and no more")
    letters = sum(map(len, lines))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(lines, add_special_tokens=False))
    return {"library": library, "pieces": size, "letters": letters, "tokens": tokens}


def check(args: argparse.Namespace) -> None:
    """Raises ArgumentError for a value out of range, or a place that must not be written to."""
    if args.vocab_size < SMALLEST:
        raise VocabularyError(
            f"--vocab_size {args.vocab_size}: expected at least {SMALLEST}; {SMALLEST - 1} of them are special and "
            "byte pieces"
        )
    if not 0.98 <= args.character_coverage <= 1.0:
        raise VocabularyError(f"--character_coverage {args.character_coverage}: expected 0.98 to 1.0")
    if not 2 <= args.max_piece_length <= 512:
        raise VocabularyError(f"--max_piece_length {args.max_piece_length}: expected 2 to 512 characters")
    if args.min_frequency is not None and choose_library(args.kind, args.library) != "tokenizers":
        raise VocabularyError("--min_frequency: sentencepiece has no such setting; leave it out")
    if args.min_frequency is None:
        args.min_frequency = 2
    if args.min_frequency < 1:
        raise VocabularyError(f"--min_frequency {args.min_frequency}: expected at least 1")
    check_place(args.output_dir, args.overwrite_output_dir, {"text_dir": args.text_dir})


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text_dir", type=path_of, required=True, help=".txt and .jsonl files, or one file")
    parser.add_argument("--output_dir", type=path_of, required=True, help="where the tokenizer is written")
    parser.add_argument("--kind", choices=KINDS, default="bpe", help="default: bpe")
    parser.add_argument("--library", choices=LIBRARIES, help="default: tokenizers for bpe, sentencepiece for unigram")
    parser.add_argument("--vocab_size", type=int, default=8000, help=f"with {SMALLEST - 1} byte and special pieces")
    parser.add_argument("--character_coverage", type=float, default=0.9995, help="share of letters that get a piece")
    parser.add_argument("--max_piece_length", type=int, default=16, help="letters of the longest piece; default: 16")
    parser.add_argument("--min_frequency", type=int, help="of a pair that is merged, with tokenizers; default: 2")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace what is at --output_dir")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        built = build(args)
    except ArgumentError as error:
        print_error(error)
        sys.exit(1)
    per_thousand = 1000 * built["tokens"] / built["letters"]
    print(
        f"{args.output_dir}: {args.kind} of {built['pieces']:,} pieces with {built['library']}, {per_thousand:.0f} "
        f"tokens per 1,000 letters of the {built['letters']:,} that it was built from"
    )


if __name__ == "__main__":
    main()
