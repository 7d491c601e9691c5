"""A tokenizer's pieces as texts: read from files, and written in the tokenizer's spelling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stagewise.data.records import find_files
from stagewise.errors import RecordError, VocabularyError
from stagewise.formats.parsers import parse_text
from stagewise.formats.strict_json import parse_json

SPACE = "▁"  # SentencePiece's space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


# ---------------------------------------------------------------------------------------------------- what is read


def read_texts(path: str | Path, flag: str) -> list[str]:
    """The documents of .txt files (one each) and of .jsonl lines {"text": …}; folders are searched recursively.

    Raises:
        ArgumentError: naming the flag, or the file and line.
    """
    texts = []
    for file in find_files(path, (".txt", ".jsonl"), f"--{flag}"):
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise VocabularyError(
                f"--{flag}: {file} is not plain UTF-8 text ({error.reason}): unpack or convert it"
            ) from error
        if file.suffix.lower() == ".txt":
            texts.append(content)
            continue
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                texts.append(parse_text(_record(line, f"{file}:{number}"), f"{file}:{number}"))
    if not any(text.strip() for text in texts):
        raise VocabularyError(f"--{flag} {path}: there is no text in it")
    return texts


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise RecordError(where, "broken json", f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RecordError(where, "no record", f'expected {{"text": …}}, found a {type(record).__name__}')
    return record


def read_words(path: str | Path) -> list[str]:
    """The words of a list, one per line, in order, without duplicates.

    Raises:
        VocabularyError: for a file that is missing or has no words.
    """
    file = Path(path)
    if not file.is_file():
        raise VocabularyError(f"--word_list {path}: no such file; give a text file with one word a line")
    try:
        words = dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise VocabularyError(f"--word_list {path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    words.pop("", None)
    if not words:
        raise VocabularyError(f"--word_list {path}: there is no word in it")
    return list(words)


def read_pieces(path: str | Path) -> list[str]:
    """The pieces of a tokenizer as texts, in the best order for adding them, with leading spaces.

    Takes a directory with tokenizer.json or tokenizer.model, or such a file. Left out: bytes, parts of a character,
    special tokens. Single characters come first; after them a BPE's pieces by rank, other vocabularies' by length.

    Raises:
        VocabularyError: for a path without a tokenizer, or a kind whose pieces cannot be read.
    """
    top = Path(path)
    files = [top] if top.is_file() else [top / "tokenizer.json", top / "tokenizer.model"]
    file = next((f for f in files if f.is_file() and f.suffix in (".json", ".model")), None)
    if file is None:
        raise VocabularyError(f"--vocabulary {path}: expected a directory with tokenizer.json or tokenizer.model")
    pieces, ranked = _from_model(file) if file.suffix == ".model" else _from_json(file)
    texts = list(dict.fromkeys(piece for piece in pieces if piece.strip()))
    return sorted(texts, key=lambda text: len(text) > 1) if ranked else sorted(texts, key=len)


def _from_json(file: Path) -> tuple[list[str], bool]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind, vocab = data["model"].get("type"), data["model"]["vocab"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise VocabularyError(f"--vocabulary {file}: not a tokenizer.json: {error!r}") from error
    if kind not in ("BPE", "Unigram"):
        raise VocabularyError(f"--vocabulary {file}: a {kind} tokenizer; expected BPE or unigram")
    added = {token["content"] for token in data["added_tokens"]}
    names = sorted(vocab, key=vocab.get) if kind == "BPE" else [name for name, _ in vocab]
    if kind == "Unigram" and (unknown := data["model"].get("unk_id")) is not None:
        added.add(names[unknown])
    names = [name for name in names if name not in added and not BYTE_PIECE.fullmatch(name)]
    if is_byte_level(data):
        return [text for name in names if (text := bytes_to_text(name)) is not None], True
    return [name.replace(SPACE, " ") for name in names], kind == "BPE"


def _from_model(file: Path) -> tuple[list[str], bool]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no public name that all its versions share
        raise VocabularyError(f"--vocabulary {file}: not a SentencePiece model: {error}") from error
    normal = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == p.NORMAL]
    return normal, proto.trainer_spec.model_type == proto.trainer_spec.BPE


# ----------------------------------------------------------------------------------- how a tokenizer writes a piece


def _byte_letters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are counted up from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_letters()


def bytes_to_text(piece: str) -> str | None:
    """The text of a byte-level piece, None if it is not valid text: half a character, or not a byte-level piece."""
    if any(letter not in BYTES for letter in piece):
        return None
    try:
        return bytes(BYTES[letter] for letter in piece).decode("utf-8")
    except UnicodeDecodeError:
        return None


def is_byte_level(data: dict[str, Any]) -> bool:
    """Whether the vocabulary is written in characters for bytes."""
    return any('"ByteLevel"' in json.dumps(data.get(part)) for part in ("pre_tokenizer", "normalizer"))


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what it adds to or strips from the start of a text."""
    if part is None or part["type"] in ("Prepend", "Strip", "WhitespaceSplit"):
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [kept for inner in part[key] if (kept := _without_prefix(inner)) is not None]}
    changes = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return {**part, **changes.get(part["type"], {})}


class Writing:
    """How a tokenizer writes a text in its vocabulary: `Ġword` or `▁word`, characters for bytes."""

    def __init__(self, data: dict[str, Any]):
        self.byte_level = is_byte_level(data)
        empty = {**data, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
        parts = {name: _without_prefix(data.get(name)) for name in ("normalizer", "pre_tokenizer")}
        self._rules = Tokenizer.from_str(json.dumps({**empty, **parts, "post_processor": None, "decoder": None}))

    def words(self, text: str) -> list[str]:
        """The parts into which the tokenizer splits a text before it looks for pieces; no piece spans two of them."""
        rules = self._rules
        if rules.normalizer is not None:
            text = rules.normalizer.normalize_str(text)
        leads = not self.byte_level and text.startswith((" ", SPACE))
        text = text[1:] if leads else text
        words = [text] if rules.pre_tokenizer is None else [w for w, _ in rules.pre_tokenizer.pre_tokenize_str(text)]
        if self.byte_level:
            return words
        words = [word.replace(" ", SPACE) for word in words]
        return [SPACE + (words[0] if words else ""), *words[1:]] if leads else words
