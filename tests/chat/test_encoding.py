"""Segments → ids and labels: learned tokens written out, prompts that are prefixes, limits."""

import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken

from stagewise.chat.encoding import ConversationEncoder, encode_segments
from stagewise.chat.preference_encoding import encode_preference, encode_prompt
from stagewise.chat.select import choose_template
from stagewise.chat.template import Segment
from stagewise.config.arguments import ChatArguments
from stagewise.data.examples import IGNORE_INDEX
from stagewise.data.records import load_records
from stagewise.errors import RecordError, TooLongError
from stagewise.formats.parsers import (
    Conversation,
    Message,
    Preference,
    parse_conversation,
    parse_preference,
    prompt_of,
)
from stagewise.tokenizer.encode import PieceEncoder
from tests.encoders import encode_conversation, encode_text
from tests.odd_tokenizers import MARKERS, lossy_tokenizer, sentencepiece_tokenizer, spelling_tokenizer


def talk(*texts, system=None, where="a.jsonl:7"):
    turns = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
    return Conversation(turns, system, where=where)


def said(text):
    return (Message("assistant", text),)


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
    return choose_template(tokenizer, ChatArguments(template_name=name)), tokenizer


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


FORMS = tuple(LEARNED)  # of every template, the text and what is learned of it stand in test_template_forms.py


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["spelling", "byte-level with bos"])
def test_learned_tokens(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    example, cut = encode_conversation(tokenizer, template, talk("Hi", "Hello", "Bye", "Ciao"), 9999)
    assert answers(tokenizer, example) == LEARNED[name]
    assert (cut, example.where) == (False, "a.jsonl:7")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["legacy llama", "metaspace first", "metaspace always"])
def test_learned_tokens_where_the_tokenizer_puts_spaces(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    example, _ = encode_conversation(tokenizer, template, talk("Hi", "Hello", "Bye", "Ciao"), 9999)
    assert answers(tokenizer, example) == LLAMA[name]


@pytest.mark.parametrize("name", FORMS)
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


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("what", TALKS)
def test_prompt_ids_are_a_prefix_of_the_whole(name, kind, what, zoo):
    template, tokenizer = bound(zoo[kind], name)
    conversation = TALKS[what]
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)
    for turns in range(1, len(conversation.messages), 2):
        part = dataclasses.replace(conversation, messages=conversation.messages[: turns + 1])
        prompt = encode_prompt(tokenizer, template, prompt_of(part), 9999)[0]
        assert whole.input_ids[: len(prompt)] == prompt
        # what follows the prompt is learned, what ends it is not
        assert whole.labels[len(prompt)] != IGNORE_INDEX
        assert whole.labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["spelling", "byte-level with bos", "legacy llama", "metaspace first"])
def test_ids_equal_what_a_server_makes_of_the_saved_template(name, kind, zoo):
    template, tokenizer = bound(zoo[kind], name)
    conversation = talk("Hi", "Hello", "Bye", "Ciao", "Us", "Go", system="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}]
    messages += [{"role": message.role, "content": message.content} for message in conversation.messages]
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)
    assert tokenizer.apply_chat_template(messages)["input_ids"] == whole.input_ids
    prompt = encode_prompt(tokenizer, template, prompt_of(conversation), 9999)[0]
    assert tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"] == prompt


@pytest.mark.parametrize("name", FORMS)
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


# --- what is learned -------------------------------------------------------------------------------------------------


def marked(conversation, *unlearned):
    """The conversation with weight 0 for the turns of these numbers."""
    messages = enumerate(conversation.messages)
    messages = tuple(dataclasses.replace(message, learn=number not in unlearned) for number, message in messages)
    return dataclasses.replace(conversation, messages=messages)


def test_a_turn_with_weight_0_is_context(spelling):
    template, tokenizer = bound(spelling, "chatml")
    plain, _ = encode_conversation(tokenizer, template, talk("a", "b", "c", "d"), 9999)
    for turn, learned in ((1, ["d", "<|im_end|>"]), (3, ["b", "<|im_end|>"])):
        example, _ = encode_conversation(tokenizer, template, marked(talk("a", "b", "c", "d"), turn), 9999)
        assert example.input_ids == plain.input_ids
        assert answers(tokenizer, example) == [learned]
    with pytest.raises(RecordError, match=r"a\.jsonl:7: every answer has weight 0") as caught:
        encode_conversation(tokenizer, template, marked(talk("a", "b"), 1), 9999)
    assert caught.value.reason == "nothing learned"


def test_a_turn_with_weight_0_is_not_learned_with_the_inputs_either(spelling):
    template, tokenizer = bound(spelling, "chatml")
    plain, _ = encode_conversation(tokenizer, template, talk("a", "b", "c", "d"), 9999)
    # tokens 0–19 the first question and what leads to the answer, 20–21 the answer, 22–42 the second question …
    for turn, unlearned in ((1, range(20, 22)), (3, range(43, 45)), (0, range(20)), (2, range(22, 43))):
        conversation = marked(talk("a", "b", "c", "d"), turn)
        example, _ = encode_conversation(tokenizer, template, conversation, 9999, train_on_inputs=True)
        assert example.input_ids == plain.input_ids
        assert [n for n, label in enumerate(example.labels) if label == IGNORE_INDEX] == list(unlearned)


def test_mask_history_learns_what_follows_the_last_question_that_is_kept(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "b", "c", "d", "e", "f")
    example, _ = encode_conversation(tokenizer, template, conversation, 9999, mask_history=True)
    assert answers(tokenizer, example) == [["f", "<|im_end|>"]]
    shorter, cut = encode_conversation(tokenizer, template, conversation, 60, mask_history=True)
    assert (answers(tokenizer, shorter), cut) == ([["d", "<|im_end|>"]], True)
    asked = talk("a", "b", "c", "d", "e")  # the last question that was answered
    example, _ = encode_conversation(tokenizer, template, asked, 9999, mask_history=True)
    assert answers(tokenizer, example) == [["d", "<|im_end|>"]]
    with pytest.raises(RecordError, match="the last answer has weight 0") as caught:
        encode_conversation(tokenizer, template, marked(conversation, 5), 9999, mask_history=True)
    assert (type(caught.value), caught.value.reason) == (RecordError, "nothing learned")
    # the first answer has weight 0, the second is behind the limit: a larger limit keeps the record
    with pytest.raises(TooLongError, match="no label stays within the limit of 30"):
        encode_conversation(tokenizer, template, marked(talk("a", "b", "c", "d"), 1), 30)


def test_mask_history_learns_all_turns_behind_the_last_question(spelling):
    """A call, its result and the answer belong to one question."""
    template, tokenizer = bound(spelling, "chatml")
    call = json.dumps({"name": "f", "arguments": {}})
    turns = [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("tool_call", call),
        ("observation", "5"),
        ("assistant", "d"),
    ]
    conversation = Conversation(tuple(Message(*turn) for turn in turns), where="a.jsonl:7")
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)
    example, _ = encode_conversation(tokenizer, template, conversation, 9999, mask_history=True)
    assert example.input_ids == whole.input_ids
    assert answers(tokenizer, whole)[0] == ["b", "<|im_end|>"]
    assert answers(tokenizer, example) == answers(tokenizer, whole)[1:]
    assert len(answers(tokenizer, example)) == 2


def test_settings_that_contradict_each_other(spelling):
    template, tokenizer = bound(spelling, "chatml")
    with pytest.raises(ValueError, match=r"--train_on_inputs .* --mask_history .*: give one"):
        ConversationEncoder(tokenizer, template, 99, train_on_inputs=True, mask_history=True)
    with pytest.raises(ValueError, match="--truncation_side: expected right or left, found 'middle'"):
        ConversationEncoder(tokenizer, template, 99, truncation_side="middle")


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
    with pytest.raises(TooLongError) as caught:
        encode_conversation(tokenizer, template, talk("a", "b"), 20)
    assert caught.value.reason == "no room for an answer"
    with pytest.raises(RecordError, match="holds no answer") as caught:
        encode_conversation(tokenizer, template, talk("a"), 9999)
    assert caught.value.reason == "nothing learned"


def test_a_question_without_an_answer_at_the_end_is_context(spelling):
    template, tokenizer = bound(spelling, "chatml")
    example, cut = encode_conversation(tokenizer, template, talk("a", "b", "c"), 9999)
    assert answers(tokenizer, example) == [["b", "<|im_end|>"]]
    shorter, cut = encode_conversation(tokenizer, template, talk("a", "b", "c"), 25)
    assert (len(shorter.input_ids), cut) == (22, False)  # nothing that is learned is lost


def test_the_left_side_loses_whole_exchanges_and_keeps_the_system_prompt(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "b", "c", "d", "e", "f", system="s")

    def kept(limit):
        return encode_conversation(tokenizer, template, conversation, limit, truncation_side="left")

    def whole(*texts):
        return encode_conversation(tokenizer, template, talk(*texts, system="s"), 9999)[0]

    # 11 tokens of system prompt, 23 an exchange, of which the newline at the end isn't needed
    for limit, texts in ((80, "abcdef"), (79, "abcdef"), (78, "cdef"), (56, "cdef"), (55, "ef"), (33, "ef")):
        example, cut = kept(limit)
        size = min(limit, len(whole(*texts).input_ids))
        assert example.input_ids == whole(*texts).input_ids[:size]
        assert example.labels == whole(*texts).labels[:size]
        assert cut == (texts != "abcdef")
    example, cut = kept(32)  # the last exchange alone is cut
    assert (tokenizer.convert_ids_to_tokens(example.input_ids)[-1], cut) == ("f", True)
    with pytest.raises(RecordError, match="fills the limit of 31 tokens"):
        kept(31)


def test_the_left_side_drops_a_question_without_an_answer_first(spelling):
    template, tokenizer = bound(spelling, "chatml")
    example, cut = encode_conversation(tokenizer, template, talk("a", "b", "c", "d", "e"), 46, truncation_side="left")
    assert (answers(tokenizer, example), cut) == ([["b", "<|im_end|>"], ["d", "<|im_end|>"]], False)


def test_a_cut_never_ends_behind_a_header_or_in_a_later_answer(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "b", "cc", "dddd", "e", "ff")
    whole, _ = encode_conversation(tokenizer, template, conversation, 9999)
    for side, limit in itertools.product(("right", "left"), range(22, len(whole.input_ids))):
        example, _ = encode_conversation(tokenizer, template, conversation, limit, truncation_side=side)
        tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
        # the last exchange of 24 tokens needs 23: where it stands alone and is cut, the last token is its first "f"
        assert tokens[-1] == "<|im_end|>" or tokens[-2:] == ["<|im_end|>", "Ċ"] or (side, limit) == ("left", 22)
        assert len(tokens) <= limit
        spans = answers(tokenizer, example)
        assert spans == [[*"b", "<|im_end|>"], [*"dddd", "<|im_end|>"], [*"ff", "<|im_end|>"]][: len(spans)] or (
            side == "left" and spans[0][0] in "df"
        )


def test_what_cannot_stay_is_hardly_encoded(spelling, monkeypatch):
    """A conversation of a hundred times the limit costs a few times the limit."""
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk(*["word " * 10] * 400)
    encoder = ConversationEncoder(tokenizer, template, 200)
    letters = []
    original = PieceEncoder.encode
    monkeypatch.setattr(
        PieceEncoder, "encode", lambda self, texts: letters.append(sum(map(len, texts))) or original(self, texts)
    )
    example, cut = encoder(conversation)
    assert (len(answers(tokenizer, example)), cut) == (1, True)
    assert sum(letters) < 1000  # of 27,000


def test_many_at_once_are_what_each_is_alone(zoo):
    for kind in ZOO:
        template, tokenizer = bound(zoo[kind], "chatml")
        talks = [*TALKS.values(), talk("a"), talk("a" * 70, "b"), talk("a", "b" * 70), TALKS["system"]]
        for limit in (30, 60, 9999):
            encoder = ConversationEncoder(tokenizer, template, limit)
            for conversation, found in zip(talks, encoder.many(talks), strict=True):
                if isinstance(found, RecordError):
                    with pytest.raises(RecordError, match=re.escape(found.message)):
                        encode_conversation(tokenizer, template, conversation, limit)
                else:
                    alone = encode_conversation(tokenizer, template, conversation, limit)
                    assert (found.items[0][0].example(), found.cut) == alone


def test_earliest_exchanges_of_a_prompt_are_dropped_whole(spelling):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk("a", "b", "c", "d", "e", system="s")
    last = encode_prompt(tokenizer, template, talk("e", system="s"), 9999)[0]
    two = encode_prompt(tokenizer, template, talk("c", "d", "e", system="s"), 9999)[0]
    whole = encode_prompt(tokenizer, template, conversation, 9999)[0]
    for limit, expected in ((len(whole), whole), (len(whole) - 1, two), (len(two) - 1, last), (len(last), last)):
        assert encode_prompt(tokenizer, template, conversation, limit)[0] == expected
    with pytest.raises(RecordError, match=rf"a\.jsonl:7: .*alone has {len(last)} tokens.*--max_source_length"):
        encode_prompt(tokenizer, template, conversation, len(last) - 1)


# --- preferences -----------------------------------------------------------------------------------------------------


def test_what_a_prompt_has_too_much_is_not_encoded(spelling, monkeypatch):
    template, tokenizer = bound(spelling, "chatml")
    conversation = talk(*["word " * 100] * 40, "why?")
    expected = encode_prompt(tokenizer, template, talk("why?"), 99)[0]
    letters = []
    original = PieceEncoder.encode
    monkeypatch.setattr(
        PieceEncoder, "encode", lambda self, texts: letters.append(sum(map(len, texts))) or original(self, texts)
    )
    ids, kept = encode_prompt(tokenizer, template, conversation, 99)
    assert (ids, len(kept.messages)) == (expected, 1)
    assert sum(letters) < 1000  # of 20,000


def test_both_answers_follow_the_same_prompt(spelling):
    template, tokenizer = bound(spelling, "chatml")
    preference = Preference(talk("a", "b", "c"), said("yes"), said("no"), "a.jsonl:7")
    pair, cut = encode_preference(tokenizer, template, preference, 9999, 9999)
    prompt = encode_prompt(tokenizer, template, talk("a", "b", "c"), 9999)[0]
    for side, tokens in ((pair.chosen, ["y", "e", "s", "<|im_end|>"]), (pair.rejected, ["n", "o", "<|im_end|>"])):
        assert side.input_ids[: len(prompt)] == prompt
        assert answers(tokenizer, side) == [tokens]  # the answer "b" of the prompt is not learned
        assert tokenizer.convert_ids_to_tokens(side.input_ids[len(prompt) :]) == tokens
    assert (cut, pair.where) == (False, "a.jsonl:7")


def test_preference_limits(spelling):
    template, tokenizer = bound(spelling, "chatml")
    preference = Preference(talk("a", "b", "c"), said("yes"), said("no"), "a.jsonl:7")
    last = encode_prompt(tokenizer, template, talk("c"), 9999)[0]
    pair, cut = encode_preference(tokenizer, template, preference, len(last), 3)
    assert pair.chosen.input_ids[: len(last)] == pair.rejected.input_ids[: len(last)] == last
    assert answers(tokenizer, pair.chosen) == [["y", "e", "s"]]
    assert answers(tokenizer, pair.rejected) == [["n", "o", "<|im_end|>"]]
    assert cut
    with pytest.raises(RecordError, match="--max_source_length"):
        encode_preference(tokenizer, template, preference, len(last) - 1, 3)
    with pytest.raises(RecordError, match=r"the same 3 or fewer tokens.*--max_target_length") as caught:
        encode_preference(tokenizer, template, Preference(talk("c"), said("yes!"), said("yes?")), 9999, 3)
    assert (type(caught.value), caught.value.reason) == (TooLongError, "answers too long")


def test_an_answer_of_several_turns_loses_whole_turns(spelling):
    template, tokenizer = bound(spelling, "chatml")
    long = tuple(Message(role, text) for role, text in (("assistant", "y"), ("user", "a"), ("assistant", "z")))
    preference = Preference(talk("c"), long, said("no"), "a.jsonl:7")
    pair, cut = encode_preference(tokenizer, template, preference, 9999, 9999)
    # y and its end, a newline, 20 tokens of question, z and its end
    assert (answers(tokenizer, pair.chosen), cut) == ([["y", "<|im_end|>"], ["z", "<|im_end|>"]], False)
    assert len(pair.chosen.input_ids) == 20 + 25
    for limit in (24, 3):
        pair, cut = encode_preference(tokenizer, template, preference, 9999, limit)
        assert (answers(tokenizer, pair.chosen), cut) == ([["y", "<|im_end|>"]], True)
    pair, _ = encode_preference(tokenizer, template, preference, 9999, 1)
    assert answers(tokenizer, pair.chosen) == [["y"]]  # the first turn alone may be cut


def test_an_answer_whose_turns_all_have_weight_0(spelling):
    template, tokenizer = bound(spelling, "chatml")
    preference = Preference(talk("c"), said("yes"), (Message("assistant", "no", False),), "a.jsonl:7")
    with pytest.raises(RecordError, match=r"a\.jsonl:7: every turn of an answer has weight 0") as caught:
        encode_preference(tokenizer, template, preference, 9999, 9999)
    assert caught.value.reason == "nothing learned"


def test_answers_that_a_tokenizer_makes_alike(zoo):
    template, tokenizer = bound(zoo["lossy"], "vicuna")
    with pytest.raises(RecordError) as caught:
        encode_preference(tokenizer, template, Preference(talk("c"), said("Yes"), said("yes ")), 9999, 9999)
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


# --- the real tokenizer ----------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", [None, "vicuna", "alpaca", "llama2", "chatml", "qwen"])
def test_smollm_learns_exactly_the_answers(name, smollm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    template = choose_template(tokenizer, ChatArguments(template_name=name))
    conversation = talk("What helps a cold?\n", "\n Rest, 多喝水。 ", "And a cough?", "Honey 🍯")
    example, _ = encode_conversation(tokenizer, template, conversation, 512)
    spans = [
        tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens), clean_up_tokenization_spaces=False)
        for tokens in answers(tokenizer, example)
    ]
    lead, end = {"vicuna": (" ", ""), "llama2": (" ", " ")}.get(name, ("", ""))
    assert spans == [f"{lead}\n Rest, 多喝水。 {end}<|im_end|>", f"{lead}Honey 🍯{end}<|im_end|>"]
    prompt = encode_prompt(tokenizer, template, prompt_of(conversation), 512)[0]
    assert example.input_ids[: len(prompt)] == prompt
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    served = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, template, talk(messages[0]["content"]), 512)[0] == served


@pytest.mark.real
@pytest.mark.parametrize("file", ["sft/medical_zh.jsonl", "sft/sharegpt_zh.jsonl", "reward/preference_zh.jsonl"])
def test_real_records_read_back(file, smollm):
    """Every learned span of real data, decoded, is the record's own words and the end marker."""
    from transformers import AutoTokenizer

    path = Path(__file__).resolve().parents[3] / "shared/data" / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    template = choose_template(tokenizer, ChatArguments())
    parse = parse_preference if file.startswith("reward") else parse_conversation
    records, _ = load_records([path], parse, on_bad_record="skip", max_samples=60)
    for record in records:
        if isinstance(record, Preference):
            pair, _ = encode_preference(tokenizer, template, record, 99_999, 99_999)
            got = [answers(tokenizer, pair.chosen), answers(tokenizer, pair.rejected)]
            spans = [span for spans in got for span in spans]
            words = [side[0].content for side in (record.chosen, record.rejected)]
        else:
            spans = answers(tokenizer, encode_conversation(tokenizer, template, record, 99_999)[0])
            words = [message.content for message in record.messages if message.role == "assistant"]
        decoded = [tokenizer.decode(tokenizer.convert_tokens_to_ids(span)) for span in spans]
        assert decoded == [text + "<|im_end|>" for text in words], record.where
