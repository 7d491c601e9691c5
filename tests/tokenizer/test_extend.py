"""A vocabulary is built the same every time; what is added to a tokenizer is used, and all else stays as it was."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from stagewise.errors import VocabularyError
from stagewise.tokenizer.extend import extend
from stagewise.tokenizer.vocabulary_files import Writing, bytes_to_text, read_pieces, read_texts
from tests.conftest import FAMILIES, ROOT, build_tiny_tokenizer
from tools import build_tokenizer, extend_vocabulary

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
FEVER = "发热是常见的症状。发热时多喝水,多休息。病人发热三天,体温三十九度。\n"
TEXTS = {
    "byte_level": ["发", "热", "发热", " fever"],
    "llama": ["发", "热", "发热", " fever"],
    "prepending": ["发", "热", "发热", " fever"],
    "unigram": ["发", "热", "发热", " fever"],
    "t5": ["发", "热", "发热", " fever"],
}


def sentencepiece_bpe():
    """Llama's kind: ids 0-2 special, 3-258 bytes, then ▁ 259, a 260, b 261, ab 262, ▁ab 263 and f, e, v, r."""
    pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES, "▁", "a", "b", "ab", "▁ab", "f", "e", "v", "r"]
    return {piece: number for number, piece in enumerate(pieces)}, [("a", "b"), ("▁", "ab")]


def tokenizers_of(kind: str):
    """A tiny tokenizer of each kind that can be extended."""
    if kind == "byte_level":
        return build_tiny_tokenizer()
    if kind == "llama":
        vocab, merges = sentencepiece_bpe()
        return LlamaTokenizer(vocab=vocab, merges=merges)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if kind == "prepending":  # how older Llama checkpoints put the space in front
        vocab, merges = sentencepiece_bpe()
        backend = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
        )
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(decoder)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    letters = [("▁", -2.0), ("a", -3.0), ("b", -3.0), ("ab", -4.0), ("c", -5.0), ("z", -20.0), ("▁ab", -6.0)]
    letters += [(letter, -7.0) for letter in "fever"[:4]] + [("r", -7.0)]
    if kind == "unigram":
        special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -20.0) for piece in BYTE_PIECES)]
        letters = list(dict(special + letters).items())
        backend = Tokenizer(models.Unigram(letters, unk_id=0, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(decoder)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    assert kind == "t5"  # no bytes: an unknown letter is lost; spaces are thrown away and put back
    letters = list(dict([("<unk>", 0.0), ("</s>", 0.0), *letters]).items())
    backend = Tokenizer(models.Unigram(letters, unk_id=0, byte_fallback=False))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def data_of(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def backend_of(data: dict) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(data))


def ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def random_texts(letters: str, count: int = 200) -> list[str]:
    choose = random.Random(0)
    return ["".join(choose.choices(letters, k=choose.randint(1, 24))) for _ in range(count)]


# ── what is written by hand ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_byte_level_piece_is_merged_from_bytes_letter_by_letter():
    data = data_of(build_tiny_tokenizer())
    before = backend_of(data)
    extension = extend(data, ["发", "热", "发热"])
    # 发 is E5 8F 91, 热 is E7 83 AD; in GPT-2's letters å ı ĳ and ç ĥ Ń
    assert extension.new == {"åıĳ": 301, "çĥŃ": 303, "åıĳçĥŃ": 304}
    assert extension.parts == {"åı": 300, "çĥ": 302}
    merges = extension.data["model"]["merges"][len(data["model"]["merges"]) :]
    assert merges == [["å", "ı"], ["åı", "ĳ"], ["ç", "ĥ"], ["çĥ", "Ń"], ["åıĳ", "çĥŃ"]]
    after = backend_of(extension.data)
    byte = {
        byte: before.token_to_id(letter) for byte, letter in zip(b"\xe5\x8f\x91\xe7\x83\xad", "åıĳçĥŃ", strict=True)
    }
    assert ids(before, "发热") == [byte[n] for n in (0xE5, 0x8F, 0x91, 0xE7, 0x83, 0xAD)]
    assert ids(after, "发热") == [304]
    assert ids(after, "热发热发") == [303, 304, 301]
    assert extension.replaced == {
        300: [byte[0xE5], byte[0x8F]],
        301: [byte[0xE5], byte[0x8F], byte[0x91]],
        302: [byte[0xE7], byte[0x83]],
        303: [byte[0xE7], byte[0x83], byte[0xAD]],
        304: [byte[n] for n in (0xE5, 0x8F, 0x91, 0xE7, 0x83, 0xAD)],
    }
    assert after.decode(ids(after, "我发热了,42!")) == "我发热了,42!"


def test_a_word_is_put_together_from_whole_letters():
    extension = extend(data_of(build_tiny_tokenizer()), ["发热"])
    # 发 and 热, two bytes at a time; never 发 with a byte of 热
    assert (extension.parts, extension.new) == ({"åı": 300, "åıĳ": 301, "çĥ": 302, "çĥŃ": 303}, {"åıĳçĥŃ": 304})


def test_a_part_serves_other_letters_and_nothing_else_changes():
    data = data_of(build_tiny_tokenizer())
    before, after = backend_of(data), backend_of(extend(data, ["发"]).data)
    last = ids(before, "取")[-1]  # 取 is E5 8F 96: it begins as 发 does
    assert ids(after, "取") == [300, last]
    assert ids(after, "热 the user asks") == ids(before, "热 the user asks")


def test_a_sentencepiece_letter_becomes_a_piece_before_it_is_merged():
    data = data_of(tokenizers_of("llama"))
    extension = extend(data, ["发热"])
    first = len(data["model"]["vocab"])
    assert (extension.new, extension.parts) == ({"发热": first + 2}, {"发": first, "热": first + 1})
    assert extension.data["model"]["merges"] == [["a", "b"], ["▁", "ab"], ["发", "热"]]
    # <0xE5> is 3 + 0xE5, and so on
    assert extension.replaced[first + 2] == [232, 146, 148, 234, 134, 176]
    after = backend_of(extension.data)
    assert ids(after, "发热 ab") == [259, first + 2, 263]
    assert after.decode(ids(after, "发热 ab")) == "发热 ab"


def test_a_unigram_piece_beats_what_it_replaces_by_a_margin():
    data = data_of(tokenizers_of("unigram"))
    extension = extend(data, ["abc", "发", " abc"])
    scores = dict(map(tuple, extension.data["model"]["vocab"]))
    assert scores["abc"] == pytest.approx(-4 - 5 + 0.01)  # ab + c
    assert scores["发"] == -20.0  # unknown, -30: but never below the lowest, on which unknown letters hang
    assert scores["▁abc"] == pytest.approx(-2 - 8.99 + 0.01)  # ▁ + abc beats ▁ab + c, -11
    after = backend_of(extension.data)
    assert [after.id_to_token(n) for n in ids(after, "abcab abc发")] == ["▁abc", "ab", "▁abc", "发"]


def test_every_way_to_a_new_piece_is_merged():
    # a+b comes first, so "abc" is ab+c; behind "zb" is one piece, so that a rest "bc" can only be reached as b+c
    vocab = {piece: n for n, piece in enumerate(["<unk>", "a", "b", "c", "ab", "bc"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c")], unk_token="<unk>"))
    extension = extend(json.loads(backend.to_str()), ["abc"])
    assert extension.data["model"]["merges"] == [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    assert (extension.new, extension.parts) == ({"abc": 6}, {})


def test_no_merge_makes_an_old_piece():
    def extended(pieces, wanted):
        vocab = {piece: n for n, piece in enumerate(["<unk>", *pieces.split()])}
        return extend(json.loads(Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")).to_str()), [wanted])

    # abc is there and never made: a+b, then c+d, since ab+c would be abc
    found = extended("a b c d abc", "abcd")
    assert found.data["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"], ["abc", "d"]]
    assert (found.new, found.parts) == ({"abcd": 8}, {"ab": 6, "cd": 7})
    # whatever is joined first would be old
    found = extended("a b c ab bc", "abc")
    assert found.left_out == {"its parts join to old pieces that the tokenizer does not make here": ["abc"]}
    assert (found.new, found.parts, found.data["model"]["merges"], len(found.data["model"]["vocab"])) == (
        {},
        {},
        [],
        6,
    )


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_added_tokens_behind_the_vocabulary_keep_their_ids(kind, tmp_path):
    tokenizer = tokenizers_of(kind)
    tokenizer.add_tokens(["<|one|>", "<|two|>"], special_tokens=True)
    one, two = tokenizer.convert_tokens_to_ids(["<|one|>", "<|two|>"])
    data = data_of(tokenizer)
    assert "<|one|>" not in dict(data["model"]["vocab"])  # the case that this is about
    extension = extend(data, ["发热"])
    assert min(extension.replaced) == two + 1
    extend_vocabulary.save_tokenizer(tokenizer, backend_of(extension.data), tmp_path, ["<|one|>发热<|two|>"])
    again = AutoTokenizer.from_pretrained(tmp_path)
    found = again("<|two|>发热<|one|>", add_special_tokens=False)["input_ids"]
    assert (found[0], found[-1], extension.new[next(iter(extension.new))] in found) == (two, one, True)


def test_words_that_are_not_added_say_why():
    data = data_of(build_tiny_tokenizer())
    extension = extend(data, ["a", "发热,多喝水", "</s>", "发热"])
    assert extension.left_out == {
        "is one piece already": ["a"],
        "is cut by the tokenizer before pieces are looked up": ["发热,多喝水"],
        "holds one of the tokenizer's added tokens": ["</s>"],
    }
    assert len(extension.new) == 1


# ── what holds for every kind ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", TEXTS)
def test_new_pieces_are_used_and_old_ids_stay(kind, tmp_path):
    tokenizer = tokenizers_of(kind)
    data = data_of(tokenizer)
    before, extension = backend_of(data), extend(data, TEXTS[kind])
    after = backend_of(extension.data)
    assert len(extension.new) == 4 and not extension.left_out
    assert set(extension.replaced) == set(
        range(min(extension.replaced), min(extension.replaced) + len(extension.replaced))
    )
    assert all(after.token_to_id(piece) == number for piece, number in before.get_vocab().items())
    assert [n for n in ids(after, "ab 发热 fever") if n in extension.replaced] == [
        extension.new[piece] for piece in Writing(data).words("发热") + Writing(data).words(" fever")
    ]
    extend_vocabulary.save_tokenizer(tokenizer, after, tmp_path, ["ab 发热 fever"])
    again = AutoTokenizer.from_pretrained(tmp_path)("ab 发热 fever", add_special_tokens=False)["input_ids"]
    assert again == ids(after, "ab 发热 fever")


@pytest.mark.parametrize("kind", TEXTS)
def test_random_text_comes_back_and_text_without_new_pieces_is_encoded_as_before(kind):
    data = data_of(tokenizers_of(kind))
    before, extension = backend_of(data), extend(data, TEXTS[kind])
    after, same, used, back = backend_of(extension.data), 0, 0, 0
    for text in random_texts("ab feverc发热取我,9é\n👩"):
        found = ids(after, text)
        new = not extension.replaced.keys().isdisjoint(found)
        used += new
        if not new:
            same += 1
            assert found == ids(before, text)
        if kind == "t5":  # throws spaces away, and a row of unknown letters is one token
            continue
        assert len(found) <= len(ids(before, text))
        if before.decode(ids(before, text)) == text:
            back += 1
            assert after.decode(found) == text
    assert min(same, used) > 10
    assert back == 200 or kind == "t5" or (back > 150 and kind != "byte_level")  # others lose a leading space


@pytest.mark.parametrize("kind", TEXTS)
def test_every_new_merge_makes_a_new_piece(kind):
    data = data_of(tokenizers_of(kind))
    extension = extend(data, [*TEXTS[kind], "aab", "bab", "abab", "发热发热", "热发"])
    made = extension.new.keys() | extension.parts.keys()
    if data["model"]["type"] == "BPE":
        old = len(data["model"]["merges"])
        assert extension.data["model"]["merges"][:old] == [list(pair) for pair in data["model"]["merges"]]
        assert all("".join(pair) in made for pair in extension.data["model"]["merges"][old:])
    else:
        assert extension.data["model"]["vocab"][: len(data["model"]["vocab"])] == data["model"]["vocab"]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer", "T5Tokenizer"])
def test_classes_of_transformers_read_what_is_written(name, tmp_path):
    """They build a tokenizer of their own from the vocabulary and merges of tokenizer.json."""
    if name == "T5Tokenizer":
        letters = ["▁", "a", "b", "▁ab", "z"]
        parts = {"vocab": [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -9.0) for letter in letters)]}
    elif name == "GemmaTokenizer":
        vocab, merges = sentencepiece_bpe()
        parts = {"vocab": {**vocab, "<pad>": len(vocab), "<eos>": len(vocab) + 1, "<bos>": len(vocab) + 2}}
        parts["merges"] = merges
    else:
        model = data_of(build_tiny_tokenizer())["model"]
        parts = {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}
    tokenizer = getattr(transformers, name)(**parts)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    extension = extend(data_of(tokenizer), TEXTS["llama"])
    text = "<|im_start|>ab 发热 fever"
    extend_vocabulary.save_tokenizer(tokenizer, backend_of(extension.data), tmp_path, [text])
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again).__name__ == name
    found = again(text, add_special_tokens=False)["input_ids"]
    assert found[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [n for n in found if n in extension.replaced] == [
        extension.new[word]
        for word in (*Writing(data_of(tokenizer)).words("发热"), *Writing(data_of(tokenizer)).words(" fever"))
    ]


# ── building ────────────────────────────────────────────────────────────────────────────────────────────────────────

BUILDS = [("bpe", "tokenizers"), ("bpe", "sentencepiece"), ("unigram", "sentencepiece")]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts" / "nested"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(FEVER * 8, encoding="utf-8")
    lines = [{"text": f"病人发热{number}天 with fever and 多喝水"} for number in range(20)]
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path / "texts"


@pytest.mark.parametrize(("kind", "library"), BUILDS)
def test_a_vocabulary_is_built_the_same_every_time_and_loses_nothing(kind, library, texts, tmp_path):
    words = ["--text_dir", str(texts), "--vocab_size", "340", "--kind", kind, "--library", library, "--output_dir"]
    for name, seed in (("one", "1"), ("two", "2")):
        command = [sys.executable, "-m", "tools.build_tokenizer", *words, str(tmp_path / name)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert "发热" in tokenizer.get_vocab()
    for text in [FEVER, " two  spaces\tand\n", "<0x41> 未见过的字 👩", *random_texts("发热 f,9é\n")]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    if library == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one" / "tokenizer.model"))
        for text in ["病人发热三天", "with fever and 多喝水", "发热时多喝水,多休息。"]:
            assert model.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert set(read_pieces(tmp_path / "one")) == set(read_pieces(tmp_path / "one" / "tokenizer.model"))


def test_of_letters_as_rare_as_each_other_the_same_ones_are_kept(tmp_path):
    letters = [chr(0x4E00 + number) for number in range(60)]
    (tmp_path / "text.txt").write_text("病\n" * 2000 + "".join(reversed(letters)) + "\n", encoding="utf-8")
    words = ["--vocab_size", "400", "--character_coverage", "0.985", "--text_dir", str(tmp_path / "text.txt")]
    build_tokenizer.main([*words, "--output_dir", str(tmp_path / "built")])
    kept = {*"".join(read_pieces(tmp_path / "built"))} - {" "}
    assert kept == {"病", *letters[:30]}  # 2030 of 2060 letters are 98.5%


def test_pieces_come_letters_first_and_hold_no_bytes(tmp_path):
    vocab = {piece: n for n, piece in enumerate(["<unk>", "<0x41>", "发热", "▁fever", "发", "▁", "三天"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert read_pieces(tmp_path) == ["发", "发热", " fever", "三天"]


def test_pieces_of_a_byte_level_vocabulary_are_whole_letters(tmp_path):
    build_tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = read_pieces(tmp_path)
    assert pieces[:2] == ["!", '"'] and pieces[-3:] == [" when", " asks", " assist"]
    assert all(ord(piece[-1]) < 128 for piece in pieces)
    assert (bytes_to_text("åıĳ"), bytes_to_text("åı"), bytes_to_text("发")) == ("发", None, None)


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def extended(model, out, *words) -> dict:
    """Runs the command and returns the numbers in run.json."""
    extend_vocabulary.main(["--model_name_or_path", str(model), "--output_dir", str(out), *map(str, words)])
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("发热\n发\n热\n\nfever\n发热\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_are_means_old_logits_stay_and_ties_hold(family, tied, tiny_checkpoint, words, tmp_path):
    base = tiny_checkpoint(family, tie_word_embeddings=tied, vocab_size=300)
    manifest = extended(base, tmp_path / "out", "--word_list", words, "--pad_to_multiple_of", 16)
    old, new = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # 发 and 热 with a part each, 发热; " fever" has parts of its own
    rows = new.get_input_embeddings().weight
    assert len(rows) == new.config.get_text_config().vocab_size == manifest["vocabulary"]["rows"] == 320
    replaced = AutoTokenizer.from_pretrained(base)("发热", add_special_tokens=False)["input_ids"]
    (number,) = tokenizer("发热", add_special_tokens=False)["input_ids"]
    assert number >= 300 and len(replaced) == 6
    for before, after in (
        (old.get_input_embeddings().weight, rows),
        (old.get_output_embeddings().weight, new.get_output_embeddings().weight),
    ):
        assert torch.equal(after[:300], before)
        torch.testing.assert_close(after[number], torch.stack([before[n] for n in replaced]).mean(0))
        torch.testing.assert_close(after[319], before.mean(0))  # padding
    assert (new.get_output_embeddings().weight is rows) == (
        old.get_output_embeddings().weight is old.get_input_embeddings().weight
    )
    row = torch.tensor([[11, 12, 13, 14]])
    with torch.no_grad():
        torch.testing.assert_close(new(row).logits[..., :300], old(row).logits)


def test_rows_that_are_there_are_used_and_precision_stays(tiny_checkpoint, words, tmp_path):
    base = tiny_checkpoint("llama", dtype=torch.bfloat16)  # 320 rows for 300 ids
    assert extended(base, tmp_path / "out", "--word_list", words)["vocabulary"]["rows"] == 320
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        changed = (tensor != after[name]).reshape(len(tensor), -1).any(dim=1).nonzero().flatten().tolist()
        assert all(300 <= row < 310 for row in changed) and bool(changed) == (name in EMBEDDINGS)


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def test_the_same_input_gives_the_same_files(tiny_checkpoint, words, tmp_path):
    base = tiny_checkpoint("llama")
    for name in ("one", "two"):
        extended(base, tmp_path / name, "--word_list", words)
    for file in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_report_counts_tokens_of_a_held_out_text(tiny_checkpoint, words, tmp_path, capsys):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("发热发热发取", encoding="utf-8")  # 6 letters of 3 bytes; after: 发热 发热 发 [part, byte]
    found = extended(tiny_checkpoint("llama"), tmp_path / "out", "--word_list", words, "--report_file", held_out)
    assert found["vocabulary"]["report"] == {
        "characters": 6,
        "tokens_before": 18,
        "tokens_after": 5,
        "per_1000_before": 3000.0,
        "per_1000_after": 833.3,
        "new_pieces_met": 3,
        "share_of_tokens_new": 0.8,
    }
    assert "3,000.0 before, 833.3 after (3.60 times fewer)" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tiny_checkpoint, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extend_vocabulary, "load_causal_lm", lambda *_, **__: pytest.fail("weights were loaded"))
    base = tiny_checkpoint("llama")
    extend_vocabulary.main(["--model_name_or_path", str(base), "--word_list", str(words), "--dry_run"])
    assert "4 new pieces from id 300" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", [" fever", "39", "发热"]), ("always", [" fever", " 39", " 发热"]), ("never", ["fever", "39", "发热"])],
)
def test_listed_words_stand_behind_a_space_where_their_script_has_spaces(asked, expected):
    assert [extend_vocabulary.placed(word, asked) for word in ("fever", "39", "发热")] == expected


# ── refused ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output_dir {out}", "nothing to add: give --vocabulary DIRECTORY, --word_list FILE, or both"),
        ("--word_list {words}", "--output_dir is missing"),
        ("--word_list {out} --output_dir {out}", "--word_list {out}: no such file"),
        ("--vocabulary {out} --output_dir {out}", "--vocabulary {out}: expected a directory with tokenizer.json"),
        ("--vocabulary {model} --output_dir {out} --leading_space never", "--leading_space has no effect without"),
        (
            "--word_list {words} --output_dir {out} --max_new_pieces 0",
            "--max_new_pieces: expected at least 1, found 0",
        ),
        ("--word_list {words} --output_dir {model}", "--output_dir {model} holds --model_name_or_path"),
        ("--word_list {words} --output_dir {words}", "--output_dir {words} holds --word_list"),
        ("--word_list {words} --output_dir {full}", "--output_dir {full} is not empty: add --overwrite_output_dir"),
        ("--word_list {words} --output_dir {out} --report_file {out}", "--report_file: there is no folder or file"),
        ("--vocabulary {model} --output_dir {out}", "nothing to add: "),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_load(
    flags, message, tiny_checkpoint, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(extend_vocabulary, "load_causal_lm", lambda *_, **__: pytest.fail("weights were loaded"))
    places = {"out": tmp_path / "out", "words": words, "model": tiny_checkpoint("llama"), "full": tmp_path / "full"}
    places["full"].mkdir()
    (places["full"] / "mine.txt").write_text("mine")
    command = ["--model_name_or_path", str(places["model"]), *flags.format(**places).split()]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        extend_vocabulary.main(command)
    assert f"error: {message.format(**places)}" in capsys.readouterr().err
    assert not places["out"].exists() and (places["full"] / "mine.txt").read_text() == "mine"


def test_an_error_while_writing_leaves_what_was_there(tiny_checkpoint, words, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise VocabularyError("no weights today")

    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    monkeypatch.setattr(extend_vocabulary, "load_causal_lm", fail)
    with pytest.raises(SystemExit, match="1"):
        extended(tiny_checkpoint("llama"), out, "--word_list", words, "--overwrite_output_dir")
    assert "error: no weights today" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words.txt"]
    assert (out / "mine.txt").read_text() == "mine"


def test_other_kinds_of_tokenizers_are_refused():
    marked = models.BPE(vocab={"a": 0, "b</w>": 1}, merges=[], end_of_word_suffix="</w>")
    for model, message in (
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "a WordPiece tokenizer; only BPE and unigram"),
        (marked, "its BPE marks words by end_of_word_suffix"),
    ):
        with pytest.raises(VocabularyError, match=message):
            extend(json.loads(Tokenizer(model).to_str()), ["发热"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kind unigram --library tokenizers", "--library tokenizers --kind unigram: its trainer gives another"),
        ("--vocab_size 259", "--vocab_size 259: expected at least 260"),
        ("--vocab_size 270", "--vocab_size 270: the special and byte pieces and the"),
        ("--character_coverage 0.5", "--character_coverage 0.5: expected 0.98 to 1.0"),
        ("--max_piece_length 1", "--max_piece_length 1: expected 2 to 512 characters"),
        ("--kind unigram --min_frequency 3", "--min_frequency: sentencepiece has no such setting"),
        ("--min_frequency 0", "--min_frequency 0: expected at least 1"),
    ],
)
def test_a_vocabulary_that_cannot_be_built_is_refused(flags, message, texts, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        build_tokenizer.main(["--text_dir", str(texts), "--output_dir", str(tmp_path / "out"), *flags.split()])
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_that_cannot_be_read_name_file_and_line(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\nno json\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad.jsonl:2: .*not JSON"):
        read_texts(bad, "text_dir")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(VocabularyError, match="--text_dir .*: there is no text in it"):
        read_texts(tmp_path / "empty.txt", "text_dir")


# ── the whole way ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tied", [True, False])
def test_build_extend_pretrain_merge(tied, texts, tiny_checkpoint, tmp_path, stage):
    import merge_peft_adapter

    base = tiny_checkpoint("llama", tie_word_embeddings=tied)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (base / "NOTICE").write_text("whose it is")
    build_tokenizer.main(
        ["--text_dir", str(texts), "--output_dir", str(tmp_path / "vocabulary"), "--vocab_size", "340"]
    )
    extended(base, tmp_path / "extended", "--vocabulary", tmp_path / "vocabulary")
    words = ["--train_file_dir", texts, "--max_steps", 2, "--modules_to_save", "embed_tokens,lm_head", "--use_cpu"]
    words += ["--report_to", "none", "--per_device_train_batch_size", 1, "--block_size", 64, "--learning_rate", 1e-2]
    adapter = stage(
        "pretraining", "--model_name_or_path", tmp_path / "extended", *words, "--output_dir", tmp_path / "pt"
    )
    merged = tmp_path / "merged"
    merge_peft_adapter.main(["--lora_model", str(adapter), "--output_dir", str(merged)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert (
        tokenizer("发热 fever", add_special_tokens=False)["input_ids"]
        != (AutoTokenizer.from_pretrained(base)("发热 fever", add_special_tokens=False)["input_ids"])
    )
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "extended").get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight[300:], start[300:])  # the new rows were trained
    run_json = json.loads((merged / "run.json").read_text(encoding="utf-8"))
    assert [step["stage"] for step in run_json["lineage"]] == ["vocabulary", "pt", "merge"]
    assert run_json["license"]["id"] == "apache-2.0"
    assert (merged / "NOTICE").read_text() == "whose it is"


@pytest.mark.real
def test_chinese_takes_about_half_the_tokens_on_the_small_model(smollm, tmp_path, capsys):
    train, held_out = (ROOT / "data" / "pretrain" / part / "chinese.jsonl" for part in ("train", "validation"))
    build_tokenizer.main(
        ["--text_dir", str(train), "--output_dir", str(tmp_path / "vocabulary"), "--vocab_size", "2000"]
    )
    words = ["--model_name_or_path", str(smollm), "--vocabulary", str(tmp_path / "vocabulary"), "--dry_run"]
    extend_vocabulary.main([*words, "--report_file", str(held_out)])
    before, after = (
        float(number.replace(",", ""))
        for number in capsys.readouterr()
        .out.split("characters: ")[1]
        .replace(" before", "")
        .split(" after")[0]
        .split(", ")
    )
    assert after < before / 1.8  # docs/vocabulary.md has the measured 1.90
