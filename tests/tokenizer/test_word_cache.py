"""Words: the same ids as the tokenizer gives for the whole text, each word encoded once."""

from array import array

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stagewise.tokenizer import word_cache as words_module
from stagewise.tokenizer.encode import PieceEncoder
from stagewise.tokenizer.word_cache import WordCache, word_pattern
from tests.odd_tokenizers import lossy_tokenizer, sentencepiece_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<unk0>", "[/INST]"]
DOTTED = [*SPECIAL, "a.b"]
# As in the tokenizer.json of Llama 3 and of Qwen 2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
# Trained on what joins marks, digits and white space of every kind into tokens, within the words that the form allows.
CORPUS = [
    "the end.\n\nThe end...  \n  it's  don't 'll 1234 12,345.67 (foo) \"bar\" a_b <|x|> \t\t\r\n\r\n",
    "    return x.y(z)\n\n\n        if a1 == b2:\r\n\t# ---- ==== //// \u00a0\u00a0 \u3000 \u2028 .\n ,\n !!\n\n",
    " 中文 多喝水。 é É ;)\n",
] * 3
PIECES = [
    *"aZé中1²٣ \n\t\r.,'\"(_|<>/-:~^\\]&",
    *("  ", "\n\n", "\r\n", " \n ", ".\n", "...", "'s", "'LL", "the", " end", "12345", "a1b", "ſ", "Ġ", "🍯", "👩‍⚕️"),
    *("\x1c", "\x85", "\xa0", "\u0301", "e\u0301", "\u212a", "\u2028", "\u3000", "\u200b", "\ufeff"),
    *DOTTED,
]


def byte_level(*before, normalizer=None, use_regex=True, added=SPECIAL, **options):
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=options.pop("add_prefix_space", False), use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, **{"normalized": False, **options}) for token in added])
    return tokenizer


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


KNOWN = {
    "gpt2": lambda: byte_level(),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), added=DOTTED),
    "llama3": lambda: byte_level(split(LLAMA3), use_regex=False),
    "qwen2": lambda: byte_level(split(QWEN2), use_regex=False, normalizer=normalizers.NFC(), normalized=True),
}


@pytest.fixture(scope="module", params=KNOWN)
def backend(request):
    return KNOWN[request.param]()


def by_words(backend):
    def encode(texts):
        return [array("i", found.ids) for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return WordCache(word_pattern(backend), encode)


def whole(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=400, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), min_size=1, max_size=4))
@example(texts=["the end.\n\nThe  end \n\n  it's", "a\u00a0 \n b", "a. \n<|im_end|> b", "xa.by", "don'ta.b c"])
@example(texts=["".join(PIECES), " ".join(PIECES), "\n".join(PIECES), "a".join(PIECES)])
@example(texts=CORPUS[:2])
def test_words_give_what_the_whole_text_gives(backend, texts):
    encode = by_words(backend)
    expected = [whole(backend, text) for text in texts]
    assert [ids.tolist() for ids in encode(texts)] == expected
    assert [ids.tolist() for ids in encode(texts)] == expected  # and as they are remembered
    assert ["".join(encode._cut.findall(text)) for text in texts] == texts


def test_words_are_cut_where_the_tokenizer_cuts():
    text = "It rained.\nIt rained hard, 3 a.b <|im_end|>\n\n\tend"
    rest = (" hard", ",", " 3")
    assert word_pattern(KNOWN["gpt2"]()).findall(text) == [
        *("It", " rained", ".", "\nIt", " rained", *rest, " a", ".b", " <|im_end|>", "\n\n\tend", "")
    ]
    assert word_pattern(KNOWN["digits"]()).findall(text) == [  # an added token has a dot behind a letter
        *("It", " rained.", "\nIt", " rained", *rest, " a.b", " <|im_end|>", "\n\n\tend", "")
    ]
    assert word_pattern(KNOWN["llama3"]()).findall(text) == [  # ".\n" is cut out as one
        *("It", " rained", ".\nIt", " rained", *rest, " a", ".b", " <|im_end|>\n\n\tend", "")
    ]


def test_each_word_is_asked_for_once():
    asked = []
    encode = WordCache(
        word_pattern(KNOWN["gpt2"]()), lambda texts: asked.extend(texts) or [array("i", [7])] * len(texts)
    )
    assert [ids.tolist() for ids in encode(["to be or to be", "be to be"])] == [[7] * 6, [7] * 4]
    encode(["or to be"])
    assert sorted(asked) == ["", " be", " or", " to", "be", "or", "to"]


def test_a_long_text_is_taken_in_parts(backend, monkeypatch):
    texts = ["".join(PIECES[n % 7 :]) * 3 + "x" * n for n in range(0, 90, 9)] + ["y" * 99, " " * 50, "", "\n \n" * 20]
    expected = [whole(backend, text) for text in texts]
    for part in (1, 7, 30):
        monkeypatch.setattr(words_module, "PART", part)
        assert [ids.tolist() for ids in by_words(backend)(texts)] == expected


@pytest.mark.parametrize("limit", ["MOST_WORDS", "MOST_LETTERS"])
def test_what_is_remembered_is_bounded(limit, monkeypatch):
    monkeypatch.setattr(words_module, limit, 20)
    backend = KNOWN["gpt2"]()
    encode, known = by_words(backend), []
    for number in range(60):
        text = f" word{number} other{number}"
        assert encode([text])[0].tolist() == whole(backend, text)
        known.append(len(encode._known))
    assert max(known) <= 20
    assert known.count(0) > 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: byte_level(add_prefix_space=True),
        lambda: byte_level(use_regex=False),
        lambda: byte_level(split(LLAMA3), use_regex=True),
        lambda: byte_level(split(r"\p{L}+"), use_regex=False),
        lambda: byte_level(split(LLAMA3, "removed"), use_regex=False),
        lambda: byte_level(split(QWEN2), split(QWEN2), use_regex=False),
        lambda: byte_level(pre_tokenizers.Punctuation()),
        lambda: byte_level(normalizer=normalizers.Lowercase()),
        lambda: byte_level(added=["two words"]),
        lambda: byte_level(added=["  "]),
        lambda: byte_level(lstrip=True),
        lambda: byte_level(rstrip=True),
        lambda: byte_level(single_word=True),
        lambda: sentencepiece_tokenizer("first").backend_tokenizer,
        lambda: sentencepiece_tokenizer("legacy").backend_tokenizer,
        lambda: lossy_tokenizer().backend_tokenizer,
    ],
)
def test_other_tokenizers_are_given_whole_texts(other):
    assert word_pattern(other()) is None


def test_one_that_draws_its_tokens_is_given_whole_texts():
    backend = KNOWN["gpt2"]()
    backend.model.dropout = 0.5
    assert word_pattern(backend) is None


def test_one_with_a_cut_of_its_own_is_given_whole_texts():
    class Cut:
        def pre_tokenize(self, text):
            text.split(lambda number, whole: [whole])

    backend = KNOWN["gpt2"]()
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Cut())
    assert word_pattern(backend) is None


def test_a_thread_of_many_gives_the_same(tiny_tokenizer):
    encoder = PieceEncoder(tiny_tokenizer())
    texts = [*CORPUS[:2], "the user asks"]
    expected = [ids.tolist() for ids in encoder.encode(texts)]
    encoder.in_thread()
    assert [ids.tolist() for ids in encoder.encode(texts)] == expected
    assert expected[2] == tiny_tokenizer()("the user asks", add_special_tokens=False)["input_ids"]
