"""Segments → ids and labels: learned tokens written out, prompts that are prefixes, limits, the cache."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from stagewise.cache import cache_path
from stagewise.conversation import (
    Conversation,
    Message,
    Preference,
    RecordError,
    parse_conversation,
    parse_preference,
    prompt_of,
)
from stagewise.encoding import (
    IGNORE_INDEX,
    Example,
    PreferenceExample,
    encode_all,
    encode_conversation,
    encode_preference,
    encode_prompt,
    encode_segments,
    encode_text,
)
from stagewise.records import Account, load_records
from stagewise.rendering import Segment, choose_template
from template import TEMPLATES

MARKERS = ["<|im_start|>", "<|im_end|>"]
TEXT = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:'!?#<>/[]|_ "})


def talk(*texts, system=None, where="a.jsonl:7"):
    turns = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
    return Conversation(turns, system, where=where)


def wrapped(tokenizer, adds_bos=False, **options):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *MARKERS)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def spelling_tokenizer(**options):
    """Byte-level without merges: every byte is a token, so that expected lists can be written out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, **options)


def sentencepiece_tokenizer(scheme, **options):
    """Llama 2's kind: a space before a text ("legacy": before every piece of text between special tokens)."""
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *(char for char in TEXT if char != " ")]
    words = ["▁H", "▁U", "▁▁", "ll"]  # merges across the place where a space is put in front
    merges = [("▁", "H"), ("▁", "U"), ("▁", "▁"), ("l", "l")]
    vocab = {token: n for n, token in enumerate([*tokens, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, **options)


def lossy_tokenizer():
    """Lower-cases and throws white space away: ids can't be read back, prompts must still be prefixes."""
    vocab = {token: n for n, token in enumerate(["<unk>", *sorted({char.lower() for char in TEXT} - {" "})])}
    vocab |= {f"##{token}": len(vocab) + n for n, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def spelling():
    return spelling_tokenizer()


@pytest.fixture(scope="module")
def zoo(tiny_tokenizer):
    merged = tiny_tokenizer()
    merged.add_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    return {
        "spelling": spelling_tokenizer(),
        "byte-level with merges": merged,
        "byte-level with bos": spelling_tokenizer(adds_bos=True),
        "legacy llama": sentencepiece_tokenizer("legacy", adds_bos=True),
        "metaspace first": sentencepiece_tokenizer("first", adds_bos=True),
        "metaspace always": sentencepiece_tokenizer("always"),
        "lossy": lossy_tokenizer(),
    }


ZOO = [
    "spelling",
    "byte-level with merges",
    "byte-level with bos",
    "legacy llama",
    "metaspace first",
    "metaspace always",
    "lossy",
]


def bound(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    return choose_template(tokenizer, name, TEMPLATES), tokenizer


def answers(tokenizer, example):
    """The learned tokens of each answer, as the tokenizer calls them."""
    groups = itertools.groupby(
        zip(example.input_ids, example.labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX
    )
    spans = [list(group) for learned, group in groups if learned]
    assert all(token == label for span in spans for token, label in span)
    return [tokenizer.convert_ids_to_tokens([token for token, _ in span]) for span in spans]


# --- the learned tokens, written out ---------------------------------------------------------------------------------

HELLO, CIAO = ["H", "e", "l", "l", "o"], ["C", "i", "a", "o"]
LEARNED = {  # Ġ is a space, Ċ a newline in byte-level vocabularies
    "vicuna": [["Ġ", *HELLO, "</s>"], ["Ġ", *CIAO, "</s>"]],
    "alpaca": [[*HELLO, "</s>"], [*CIAO, "</s>"]],
    "llama2": [["Ġ", *HELLO, "Ġ", "</s>"], ["Ġ", *CIAO, "Ġ", "</s>"]],
    "chatml": [[*HELLO, "<|im_end|>"], [*CIAO, "<|im_end|>"]],
    "qwen": [[*HELLO, "<|im_end|>"], [*CIAO, "<|im_end|>"]],
}
LLAMA = {  # the same with a tokenizer that puts a space before a text: none but the form's own may appear
    "vicuna": [["▁H", "e", "ll", "o", "</s>"], ["▁", *CIAO, "</s>"]],
    "alpaca": [["H", "e", "ll", "o", "</s>"], [*CIAO, "</s>"]],
    "llama2": [["▁H", "e", "ll", "o", "▁", "</s>"], ["▁", *CIAO, "▁", "</s>"]],
    "chatml": [["H", "e", "ll", "o", "<|im_end|>"], [*CIAO, "<|im_end|>"]],
    "qwen": [["H", "e", "ll", "o", "<|im_end|>"], [*CIAO, "<|im_end|>"]],
}


def test_every_template_is_written_out():
    assert sorted(LEARNED) == sorted(LLAMA) == sorted(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["spelling", "byte-level with bos"])
def test_learned_tokens(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    example, cut = encode_conversation(tokenizer, template, talk("Hi", "Hello", "Bye", "Ciao"), 9999)
    assert answers(tokenizer, example) == LEARNED[name]
    assert (cut, example.where) == (False, "a.jsonl:7")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["legacy llama", "metaspace first", "metaspace always"])
def test_learned_tokens_where_the_tokenizer_puts_spaces(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    example, _ = encode_conversation(tokenizer, template, talk("Hi", "Hello", "Bye", "Ciao"), 9999)
    assert answers(tokenizer, example) == LLAMA[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_white_space_at_both_ends_of_an_answer_is_learned(name, spelling):
    template, tokenizer = bound(spelling, name)
    example, _ = encode_conversation(tokenizer, template, talk(" Hi\n", "\n\n Hello \n"), 9999)
    space = ["Ġ"] if name in ("vicuna", "llama2") else []
    end = {"vicuna": ["</s>"], "alpaca": ["</s>"], "llama2": ["Ġ", "</s>"]}.get(name, ["<|im_end|>"])
    assert answers(tokenizer, example) == [[*space, "Ċ", "Ċ", "Ġ", *HELLO, "Ġ", "Ċ", *end]]


def test_ids_and_labels_of_a_whole_conversation(spelling):
    """One row, token by token."""
    template, tokenizer = bound(spelling, "chatml")
    example, _ = encode_conversation(tokenizer, template, talk("a", "b", "c", "d"), 9999)
    user, lead = ["<|im_start|>", *"user", "Ċ"], ["<|im_start|>", *"assistant", "Ċ"]
    tokens = [*user, "a", "<|im_end|>", "Ċ", *lead, "b", "<|im_end|>", "Ċ"]
    tokens += [*user, "c", "<|im_end|>", "Ċ", *lead, "d", "<|im_end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == tokens
    learned = [n for n, label in enumerate(example.labels) if label != IGNORE_INDEX]
    assert learned == [20, 21, 43, 44]
    assert [tokens[n] for n in learned] == ["b", "<|im_end|>", "d", "<|im_end|>"]


def test_train_on_inputs_learns_everything(spelling):
    template, tokenizer = bound(spelling, "vicuna")
    example, _ = encode_conversation(tokenizer, template, talk("Hi", "Hello"), 9999, train_on_inputs=True)
    assert example.labels == example.input_ids
    plain, _ = encode_conversation(tokenizer, template, talk("Hi", "Hello"), 9999)
    assert plain.input_ids == example.input_ids


def test_each_segment_is_encoded_alone(tiny_tokenizer):
    """ "the" + "re" would be other tokens than "there" in one piece; a prompt's ids must not depend on the answer."""
    tokenizer = tiny_tokenizer()
    together = tokenizer("the user")["input_ids"]
    ids, labels = encode_segments(tokenizer, [Segment("the us", False), Segment("er", True)])
    assert ids == tokenizer("the us")["input_ids"] + tokenizer("er")["input_ids"]
    assert ids != together  # otherwise this test shows nothing
    assert labels == [IGNORE_INDEX] * len(tokenizer("the us")["input_ids"]) + tokenizer("er")["input_ids"]


# --- prompts are prefixes --------------------------------------------------------------------------------------------

TALKS = {
    "plain": talk("Hi", "Hello", "Bye", "Ciao", "Again", "Yes"),
    "system": talk("Hi", "Hello", "Bye", "Ciao", system="Be kind."),
    "newlines and spaces": talk("\nHi ", "\n\nHello  ", "  Bye\n", " Ciao", " ", "\n\nH\n"),
    "joins": talk("th", "e user", "ass", "istant", "l", "llll"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("what", TALKS)
def test_prompt_ids_are_a_prefix_of_the_whole(name, kind, what, zoo):
    template, tokenizer = bound(zoo[kind], name)
    conversation = TALKS[what]
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)
    for turns in range(1, len(conversation.messages), 2):
        part = dataclasses.replace(conversation, messages=conversation.messages[: turns + 1])
        prompt = encode_prompt(tokenizer, template, prompt_of(part), 9999)
        assert whole.input_ids[: len(prompt)] == prompt
        # what follows the prompt is learned, what ends it is not
        assert whole.labels[len(prompt)] != IGNORE_INDEX
        assert whole.labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["spelling", "byte-level with bos", "legacy llama", "metaspace first"])
def test_ids_equal_what_a_server_makes_of_the_saved_template(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    conversation = talk("Hi", "Hello", "Bye", "Ciao", "Us", "Go", system="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}]
    messages += [{"role": message.role, "content": message.content} for message in conversation.messages]
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)
    assert tokenizer.apply_chat_template(messages)["input_ids"] == whole.input_ids
    prompt = encode_prompt(tokenizer, template, prompt_of(conversation), 9999)
    assert tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ZOO)
def test_bos_is_never_doubled(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    example, _ = encode_conversation(tokenizer, template, talk("Hi", "Hello", "Bye", "Ciao"), 9999)
    adds = kind in ("byte-level with bos", "legacy llama", "metaspace first")
    places = [n for n, token in enumerate(example.input_ids) if token == tokenizer.bos_token_id]
    assert len(places) == (2 if name == "llama2" else 1 if adds else 0)
    assert places[:1] == ([0] if adds or name == "llama2" else [])
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(places))


def test_white_space_that_a_special_token_swallows(tiny_tokenizer):
    """Phi-3's markers take the white space behind them; ids must be those a server makes of the text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True, rstrip=True)]
    )
    template, tokenizer = bound(tokenizer, "chatml")
    conversation = talk("Hi", "Hello", "Bye", "Ciao")
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    example, _ = encode_conversation(tokenizer, template, conversation, 9999)
    assert example.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert "Ċ<|im_start|>" not in "".join(tokenizer.convert_ids_to_tokens(example.input_ids))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_whole_turns_are_dropped_from_the_end(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "b", "c", "dd")
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)  # 22 + 24 tokens, the last one a newline
    assert len(whole.input_ids) == 47
    for limit, kept, cut in ((47, 47, False), (46, 46, False), (45, 22, True), (22, 22, True)):
        example, was_cut = encode_conversation(tokenizer, template, conversation, limit)
        assert (example.input_ids, was_cut) == (whole.input_ids[:kept], cut)
        assert example.labels == whole.labels[:kept]


def test_only_the_first_turn_may_be_cut(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "bcdefgh", "c", "d")
    example, cut = encode_conversation(tokenizer, template, conversation, 23)
    assert answers(tokenizer, example) == [["b", "c", "d"]]  # no end marker: the answer does not end there
    assert (len(example.input_ids), cut) == (23, True)


def test_a_question_that_fills_the_limit_is_a_record_error(spelling):
    template, tokenizer = bound(spelling, "chatml")
    with pytest.raises(
        RecordError, match=r"a\.jsonl:7: the first question alone fills .* 20 tokens.*--model_max_length"
    ):
        encode_conversation(tokenizer, template, talk("a", "b"), 20)
    with pytest.raises(RecordError, match="holds no answer") as caught:
        encode_conversation(tokenizer, template, talk("a"), 9999)
    assert caught.value.reason == "nothing learned"


def test_a_question_without_an_answer_at_the_end_is_context(spelling):
    template, tokenizer = bound(spelling, "chatml")
    example, cut = encode_conversation(tokenizer, template, talk("a", "b", "c"), 9999)
    assert answers(tokenizer, example) == [["b", "<|im_end|>"]]
    shorter, cut = encode_conversation(tokenizer, template, talk("a", "b", "c"), 25)
    assert (len(shorter.input_ids), cut) == (22, False)  # nothing that is learned is lost


def test_earliest_exchanges_of_a_prompt_are_dropped_whole(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "b", "c", "d", "e", system="s")
    last = encode_prompt(tokenizer, template, talk("e", system="s"), 9999)
    two = encode_prompt(tokenizer, template, talk("c", "d", "e", system="s"), 9999)
    whole = encode_prompt(tokenizer, template, conversation, 9999)
    for limit, expected in ((len(whole), whole), (len(whole) - 1, two), (len(two) - 1, last), (len(last), last)):
        assert encode_prompt(tokenizer, template, conversation, limit) == expected
    with pytest.raises(RecordError, match=rf"a\.jsonl:7: .*alone has {len(last)} tokens.*--max_source_length"):
        encode_prompt(tokenizer, template, conversation, len(last) - 1)


# --- preferences -----------------------------------------------------------------------------------------------------


def test_both_answers_follow_the_same_prompt(spelling):
    template, tokenizer = bound(spelling, "chatml")
    preference = Preference(talk("a", "b", "c"), "yes", "no", "a.jsonl:7")
    pair, cut = encode_preference(tokenizer, template, preference, 9999, 9999)
    prompt = encode_prompt(tokenizer, template, talk("a", "b", "c"), 9999)
    for side, tokens in ((pair.chosen, ["y", "e", "s", "<|im_end|>"]), (pair.rejected, ["n", "o", "<|im_end|>"])):
        assert side.input_ids[: len(prompt)] == prompt
        assert answers(tokenizer, side) == [tokens]  # the answer "b" of the prompt is not learned
        assert tokenizer.convert_ids_to_tokens(side.input_ids[len(prompt) :]) == tokens
    assert (cut, pair.where) == (False, "a.jsonl:7")


def test_preference_limits(spelling):
    template, tokenizer = bound(spelling, "chatml")
    preference = Preference(talk("a", "b", "c"), "yes", "no", "a.jsonl:7")
    last = encode_prompt(tokenizer, template, talk("c"), 9999)
    pair, cut = encode_preference(tokenizer, template, preference, len(last), 3)
    assert pair.chosen.input_ids[: len(last)] == pair.rejected.input_ids[: len(last)] == last
    assert answers(tokenizer, pair.chosen) == [["y", "e", "s"]]
    assert answers(tokenizer, pair.rejected) == [["n", "o", "<|im_end|>"]]
    assert cut
    with pytest.raises(RecordError, match="--max_source_length"):
        encode_preference(tokenizer, template, preference, len(last) - 1, 3)
    with pytest.raises(RecordError, match=r"the same 3 or fewer tokens.*--max_target_length") as caught:
        encode_preference(tokenizer, template, Preference(talk("c"), "yes!", "yes?"), 9999, 3)
    assert caught.value.reason == "answers alike"


def test_answers_that_a_tokenizer_makes_alike(zoo):
    template, tokenizer = bound(zoo["lossy"], "vicuna")
    with pytest.raises(RecordError) as caught:
        encode_preference(tokenizer, template, Preference(talk("c"), "Yes", "yes "), 9999, 9999)
    assert caught.value.reason == "answers alike"


# --- text ------------------------------------------------------------------------------------------------------------


def names(tokenizer, examples):
    return ["".join(tokenizer.convert_ids_to_tokens(example.input_ids)) for example in examples]


def test_a_document_ends_with_eos_and_begins_with_bos_where_the_tokenizer_adds_one(zoo):
    examples = encode_text(zoo["spelling"], "ab\n", 99, "a.txt")
    assert names(zoo["spelling"], examples) == ["abĊ</s>"]
    assert examples[0].labels == examples[0].input_ids
    assert examples[0].where == "a.txt"
    assert names(zoo["byte-level with bos"], encode_text(zoo["byte-level with bos"], "ab\n", 99)) == ["<s>abĊ</s>"]


def test_every_token_of_a_long_document_is_predicted_once(spelling):
    # 7 letters and eos; a block's first token is never predicted, so each begins with the last of the block before
    assert names(spelling, encode_text(spelling, "abcdefg", 4)) == ["abcd", "defg", "g</s>"]
    assert names(spelling, encode_text(spelling, "abcdefg", 8)) == ["abcdefg</s>"]
    assert names(spelling, encode_text(spelling, "abcdefg", 7)) == ["abcdefg", "g</s>"]
    for size in range(2, 12):
        blocks = encode_text(spelling, "abcdefg", size)
        assert all(2 <= len(block.input_ids) <= size for block in blocks)
        predicted = [token for block in blocks for token in block.labels[1:]]
        assert spelling.convert_ids_to_tokens(predicted) == [*"bcdefg", "</s>"]


def test_text_needs_an_end(tiny_tokenizer, spelling):
    with pytest.raises(ValueError, match="no eos token to end a document with"):
        encode_text(tiny_tokenizer(eos=False), "a", 8)
    with pytest.raises(ValueError, match="--block_size"):
        encode_text(spelling, "a", 1)


# --- encode_all ------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(spelling):
    template, tokenizer = bound(spelling, "chatml")
    records = [talk("a", "b" * n, where=f"a.jsonl:{n + 1}") for n in range(1, 41)]
    records[7] = talk("a" * 99, "b", where="a.jsonl:9")

    def encode(conversation):
        return encode_conversation(tokenizer, template, conversation, 50)

    return records, encode, template, tokenizer


def account_of(records):
    return Account(read=len(records), kept=len(records))


def test_encode_all_counts_what_is_cut_and_left_out(job, tmp_path):
    records, encode, _, _ = job
    account = account_of(records)
    rejected = tmp_path / "rejected.jsonl"
    examples = encode_all(records, encode, account=account, on_bad_record="skip", rejected_path=rejected)
    assert [example.where for example in examples] == [f"a.jsonl:{n}" for n in range(2, 42) if n != 9]
    assert all(isinstance(example, Example) and len(example.input_ids) <= 50 for example in examples)
    # 20 tokens of prompt, n letters, the end marker: more than 50 from n = 30 on
    assert (account.read, account.kept, account.cut, account.left_out) == (40, 39, 11, {"nothing learned": 1})
    entry = json.loads(rejected.read_text())
    assert (entry["where"], entry["reason"]) == ("a.jsonl:9", "nothing learned")


def test_encode_all_stops_at_the_first_bad_record(job):
    records, encode, _, _ = job
    with pytest.raises(RecordError, match=r"^a\.jsonl:9: "):
        encode_all(records, encode, account=account_of(records))


def test_several_processes_give_the_same(job):
    records, encode, _, _ = job
    accounts = [account_of(records), account_of(records)]
    one, two = (
        encode_all(records, encode, account=account, on_bad_record="skip", num_workers=workers)
        for account, workers in zip(accounts, (None, 2), strict=True)
    )
    assert one == two
    assert accounts[0] == accounts[1]
    with pytest.raises(RecordError, match=r"^a\.jsonl:9: "):
        encode_all(records, encode, account=account_of(records), num_workers=2)


def test_no_record_left_is_an_error(job):
    _, encode, _, _ = job
    with pytest.raises(ValueError, match=r"none of the 1 records is left: \{'nothing learned': 1\}"):
        encode_all([talk("a")], encode, account=account_of([0]), on_bad_record="skip")


def test_texts_are_laid_out_flat_and_prompts_stay_lists(spelling):
    examples = encode_all(["abc", "d"], lambda text: encode_text(spelling, text, 3), account=Account(2, 2))
    assert names(spelling, examples) == ["abc", "c</s>", "d</s>"]
    template, tokenizer = bound(spelling, "chatml")
    prompts = encode_all(
        [talk("a")], lambda prompt: encode_prompt(tokenizer, template, prompt, 99), account=Account(1, 1)
    )
    assert prompts == [encode_prompt(tokenizer, template, talk("a"), 99)]


@pytest.mark.parametrize("kind", ["conversations", "prompts", "preferences"])
def test_a_second_start_reads_the_cache(kind, job, tmp_path):
    records, encode, template, tokenizer = job
    if kind == "prompts":

        def encode(conversation):
            return encode_prompt(tokenizer, template, prompt_of(conversation), 99)
    elif kind == "preferences":
        records = [Preference(talk("a"), "y" * n, "n", f"a:{n}") for n in range(1, 9)]

        def encode(preference):
            return encode_preference(tokenizer, template, preference, 50, 5)

    calls = []

    def counted(record):
        calls.append(record)
        return encode(record)

    cache = tmp_path / "cache/encoded.npz"
    accounts = [account_of(records) for _ in range(3)]
    options = {"on_bad_record": "skip", "cache_file": cache}
    first = encode_all(records, counted, account=accounts[0], **options)
    assert len(calls) == len(records)
    second = encode_all(records, counted, account=accounts[1], **options)
    assert len(calls) == len(records)  # nothing was encoded again
    assert second == first
    assert type(second[0]) is {"prompts": list, "preferences": PreferenceExample}.get(kind, Example)
    assert accounts[1] == accounts[0]
    third = encode_all(records, counted, account=accounts[2], overwrite_cache=True, **options)
    assert len(calls) == 2 * len(records)
    assert (third, accounts[2]) == (first, accounts[0])
    assert [path.name for path in cache.parent.iterdir()] == ["encoded.npz"]  # no half-written file stays


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip file"])
def test_a_damaged_cache_is_made_again(damage, job, tmp_path):
    records, encode, _, _ = job
    cache = tmp_path / "encoded.npz"
    cache.write_bytes(damage)
    examples = encode_all(records[:3], encode, account=account_of(records[:3]), cache_file=cache)
    assert len(examples) == 3
    calls = []
    assert encode_all(records[:3], calls.append, account=account_of(records[:3]), cache_file=cache) == examples
    assert calls == []


def test_the_cache_is_named_by_everything_that_matters(job, tmp_path, tiny_tokenizer):
    records, _, template, tokenizer = job
    with_token = copy.deepcopy(tokenizer)
    with_token.add_tokens(["<new>"])
    settings = {"tokenizer": tokenizer, "template": template, "limit": 50}
    first = cache_path(tmp_path, records=records, **settings)
    assert first.parent == tmp_path
    again = cache_path(tmp_path, records=list(records), **{**settings, "tokenizer": copy.deepcopy(tokenizer)})
    assert again == first
    others = [
        cache_path(tmp_path, records=records[:-1], **settings),
        cache_path(tmp_path, records=[*records[:-1], talk("a", "other")], **settings),
        cache_path(tmp_path, records=records, **{**settings, "limit": 51}),
        cache_path(tmp_path, records=records, **{**settings, "max_length": 50}),
        cache_path(tmp_path, records=records, **{**settings, "tokenizer": tiny_tokenizer()}),
        cache_path(tmp_path, records=records, **{**settings, "tokenizer": with_token}),
        cache_path(tmp_path, records=records, **{**settings, "tokenizer": spelling_tokenizer(adds_bos=True)}),
        cache_path(tmp_path, records=records, **{**settings, "template": bound(tokenizer, "vicuna")[0]}),
    ]
    assert len({first, *others}) == len(others) + 1
    with pytest.raises(TypeError, match="a cache can't be named by <object"):
        cache_path(tmp_path, records=records, anything=object())


# --- the real tokenizer ----------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", [None, "vicuna", "alpaca", "llama2", "chatml", "qwen"])
def test_smollm_learns_exactly_the_answers(name, smollm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    template = choose_template(tokenizer, name, TEMPLATES)
    conversation = talk("What helps a cold?\n", "\n Rest, 多喝水。 ", "And a cough?", "Honey 🍯")
    example, _ = encode_conversation(tokenizer, template, conversation, 512)
    spans = [
        tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens), clean_up_tokenization_spaces=False)
        for tokens in answers(tokenizer, example)
    ]
    lead, end = {"vicuna": (" ", ""), "llama2": (" ", " ")}.get(name, ("", ""))
    assert spans == [f"{lead}\n Rest, 多喝水。 {end}<|im_end|>", f"{lead}Honey 🍯{end}<|im_end|>"]
    prompt = encode_prompt(tokenizer, template, prompt_of(conversation), 512)
    assert example.input_ids[: len(prompt)] == prompt
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    served = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, template, talk(messages[0]["content"]), 512) == served


@pytest.mark.real
@pytest.mark.parametrize("file", ["sft/medical_zh.jsonl", "sft/sharegpt_zh.jsonl", "reward/preference_zh.jsonl"])
def test_real_records_read_back(file, smollm):
    """Every learned span of real data, decoded, is the record's own words and the end marker."""
    from transformers import AutoTokenizer

    path = Path(__file__).resolve().parents[2] / "shared/data" / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    template = choose_template(tokenizer, None, TEMPLATES)
    parse = parse_preference if file.startswith("reward") else parse_conversation
    records, _ = load_records([path], parse, on_bad_record="skip", max_samples=60)
    for record in records:
        if isinstance(record, Preference):
            pair, _ = encode_preference(tokenizer, template, record, 99_999, 99_999)
            got = [answers(tokenizer, pair.chosen), answers(tokenizer, pair.rejected)]
            spans, words = [span for spans in got for span in spans], [record.chosen, record.rejected]
        else:
            spans = answers(tokenizer, encode_conversation(tokenizer, template, record, 99_999)[0])
            words = [message.content for message in record.messages if message.role == "assistant"]
        decoded = [tokenizer.decode(tokenizer.convert_tokens_to_ids(span)) for span in spans]
        assert decoded == [text + "<|im_end|>" for text in words], record.where
