"""Any conversation, tokenizer and form: prompts are prefixes, answers alone are learned, limits hold."""

import functools
import itertools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from stagewise.chat.encoding import ConversationEncoder
from stagewise.chat.preference_encoding import PreferenceEncoder, PromptEncoder, encode_preference, encode_prompt
from stagewise.data.examples import IGNORE_INDEX
from stagewise.errors import RecordError
from stagewise.formats.parsers import Conversation, Message, Preference
from template import TEMPLATES
from tests.conftest import build_tiny_tokenizer
from tests.encoders import encode_conversation
from tests.odd_tokenizers import lossy_tokenizer, sentencepiece_tokenizer

KINDS = ("byte-level", "byte-level with bos", "metaspace", "legacy metaspace", "wordpiece")
FORMS = ("vicuna", "alpaca", "llama2", "phoenix", "rwkv", "chatml", "llama3", "gemma")
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
PIECES = [
    *(
        "the user",
        "Rest",
        "drink",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "a",
        "é",
        "É",
        "中文",
        "多喝水。",
        "🍯",
        "👩‍⚕️",
    ),
    *("{content}", "{{ x }}", "{%", "}", "\\n", "'", '"', "<", "USER:", " ASSISTANT:", "### Response:\n", "[/INST]"),
    *(
        "<|im_end|>",
        "<|im_start|>user\n",
        "</s>",
        "<s>",
        "<|eot_id|>",
        "<end_of_turn>",
        "▁",
        "Ġ",
        "##a",
        "\u200b",
        "\u00a0",
    ),
]
BUDGET = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def texts(pieces=tuple(PIECES)):
    return st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw, text=None, most=4, weights=False):
    """Up to `most` exchanges, with a system prompt or without."""
    text = texts() if text is None else text
    said = draw(st.lists(st.tuples(text, text), min_size=1, max_size=most))
    learn = st.booleans() if weights else st.just(True)
    messages = [
        message
        for question, answer in said
        for message in (Message("user", question), Message("assistant", answer, draw(learn)))
    ]
    return Conversation(tuple(messages), draw(st.none() | text), where="a.jsonl:1")


@functools.cache
def tokenizer_of(kind):
    made = {
        "byte-level": build_tiny_tokenizer,
        "byte-level with bos": functools.partial(build_tiny_tokenizer, adds_bos=True),
        "metaspace": functools.partial(sentencepiece_tokenizer, "first", adds_bos=True),
        "legacy metaspace": functools.partial(sentencepiece_tokenizer, "legacy", adds_bos=True),
        "wordpiece": lossy_tokenizer,
    }[kind]()
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


@functools.cache
def bound(kind, form):
    return tokenizer_of(kind), TEMPLATES[form].bind(tokenizer_of(kind))


def spans(example):
    """(start, end) of every run of learned tokens."""
    edges, learned = [], [label != IGNORE_INDEX for label in example.labels]
    for number, (before, now) in enumerate(itertools.pairwise([False, *learned, False])):
        if before != now:
            edges.append(number)
    return list(zip(edges[::2], edges[1::2], strict=True))


def rendered(tokenizer, template, conversation, generation=False):
    """What a server makes of the conversation with the saved template, as text."""
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    if conversation.system is not None:
        messages = [{"role": "system", "content": conversation.system}, *messages]
    return tokenizer.apply_chat_template(
        messages, chat_template=template.jinja(), tokenize=False, add_generation_prompt=generation
    )


def first(conversation, count):
    return replace(conversation, messages=conversation.messages[:count])


everywhere = pytest.mark.parametrize(("kind", "form"), list(itertools.product(KINDS, FORMS)))
some = pytest.mark.parametrize(
    ("kind", "form"), [(KINDS[number % len(KINDS)], form) for number, form in enumerate(FORMS)]
)


@everywhere
def test_prompts_are_prefixes_and_answers_alone_are_learned(kind, form):
    tokenizer, template = bound(kind, form)

    @settings(BUDGET, max_examples=25)
    @given(conversations())
    def check(conversation):
        whole, cut = encode_conversation(tokenizer, template, conversation, 10**6)
        assert not cut
        found = spans(whole)
        assert len(found) == len(conversation.messages) // 2
        for turn, (start, end) in enumerate(found):
            prompt = encode_prompt(tokenizer, template, first(conversation, 2 * turn + 1), 10**6)[0]
            assert whole.input_ids[: len(prompt)] == prompt
            assert start == len(prompt)
            # The answer's text, from the server's form: what follows the prompt, up to the end marker behind it.
            asked = rendered(tokenizer, template, first(conversation, 2 * turn + 1), generation=True)
            answered = rendered(tokenizer, template, first(conversation, 2 * turn + 2))
            assert answered.startswith(asked)
            words = conversation.messages[2 * turn + 1].content
            answer = answered[len(asked) :]
            answer = answer[: answer.index(template.stop, answer.index(words) + len(words)) + len(template.stop)]
            # Encoded as the middle of a text: behind the special token that ends the prompt, or behind a newline.
            specials = [token for token in tokenizer.get_added_vocab() if asked.endswith(token)]
            front = max(specials, key=len, default="\n")
            ids = tokenizer(front + answer, add_special_tokens=False)["input_ids"]
            before = tokenizer(front, add_special_tokens=False)["input_ids"]
            assert ids[: len(before)] == before
            assert whole.input_ids[start:end] == ids[len(before) :]

    check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["byte-level", "byte-level with bos"])
def test_learned_tokens_read_back_as_the_words(kind, form):
    tokenizer, template = bound(kind, form)

    @settings(BUDGET, max_examples=30)
    @given(conversations())
    def check(conversation):
        example, _ = encode_conversation(tokenizer, template, conversation, 10**6)
        asked = conversation.messages[1::2]
        for (start, end), message in zip(spans(example), asked, strict=True):
            text = tokenizer.decode(example.input_ids[start:end], clean_up_tokenization_spaces=False)
            assert text.endswith(template.stop)
            assert message.content in text
            assert (
                len(text) <= len(message.content) + len(template.stop) + 3
            )  # a form's spaces or newlines at the ends

    check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_a_server_makes_of_it(kind, form):
    """Also where a message holds the text of a control token: it is read as one in both places."""
    tokenizer, template = bound(kind, form)

    @settings(BUDGET, max_examples=25)
    @given(texts(), st.none() | texts())
    def check(question, system):
        conversation = Conversation((Message("user", question),), system, where="a.jsonl:1")
        text = rendered(tokenizer, template, conversation, generation=True)
        served = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, template, conversation, 10**6)[0] == served

    check()


@some
def test_what_is_cut_loses_whole_turns_from_its_end(kind, form):
    tokenizer, template = bound(kind, form)

    @BUDGET
    @given(conversations(), st.integers(4, 160))
    def check(conversation, limit):
        whole, _ = encode_conversation(tokenizer, template, conversation, 10**6)
        ends = [end for _, end in spans(whole)]
        try:
            example, cut = encode_conversation(tokenizer, template, conversation, limit)
        except RecordError as error:
            assert error.reason == "no room for an answer"
            assert spans(whole)[0][0] >= limit
            return
        size = len(example.input_ids)
        assert size <= limit
        assert example.input_ids == whole.input_ids[:size]
        assert example.labels == whole.labels[:size]
        if len(whole.input_ids) <= limit:
            assert (size, cut) == (len(whole.input_ids), False)
        elif ends[0] <= limit:  # as many answers as fit, each to its end
            assert size == max(end for end in ends if end <= limit)
            assert cut == (size < ends[-1])
        else:
            assert (size, cut) == (limit, True)

    check()


@some
def test_what_is_cut_on_the_left_loses_whole_exchanges_from_its_start(kind, form):
    tokenizer, template = bound(kind, form)

    @BUDGET
    @given(conversations(), st.integers(4, 160))
    def check(conversation, limit):
        def part(start):
            return replace(conversation, messages=conversation.messages[start:])

        def needed(start):
            return spans(encode_conversation(tokenizer, template, part(start), 10**6)[0])[-1][1]

        starts = range(0, len(conversation.messages), 2)
        start = next((number for number in starts if needed(number) <= limit), starts[-1])
        expected = None
        try:
            expected, cut = encode_conversation(tokenizer, template, part(start), limit)
            cut = cut or start > 0
        except RecordError:
            pass
        try:
            found = encode_conversation(tokenizer, template, conversation, limit, truncation_side="left")
        except RecordError as error:
            assert (error.reason, expected) == ("no room for an answer", None)
            return
        assert found == (expected, cut)
        assert len(found[0].input_ids) <= limit

    check()


@some
def test_weights_and_masked_history_change_labels_alone(kind, form):
    tokenizer, template = bound(kind, form)

    @BUDGET
    @given(conversations(weights=True), st.sampled_from(["plain", "inputs", "last"]))
    def check(conversation, how):
        plain = replace(conversation, messages=tuple(replace(m, learn=True) for m in conversation.messages))
        whole, _ = encode_conversation(tokenizer, template, plain, 10**6)
        weights = [message.learn for message in conversation.messages[1::2]]
        options = {"inputs": {"train_on_inputs": True}, "last": {"mask_history": True}}.get(how, {})
        if how == "last":
            weights = [weight and number == len(weights) - 1 for number, weight in enumerate(weights)]
        try:
            example, _ = encode_conversation(tokenizer, template, conversation, 10**6, **options)
        except RecordError as error:
            assert (error.reason, any(weights)) == ("nothing learned", False)
            return
        assert example.input_ids == whole.input_ids
        expected = list(whole.input_ids) if how == "inputs" else [IGNORE_INDEX] * len(whole.input_ids)
        for (start, end), weight in zip(spans(whole), weights, strict=True):
            expected[start:end] = whole.input_ids[start:end] if weight else [IGNORE_INDEX] * (end - start)
        assert example.labels == expected

    check()


@some
def test_many_at_once_are_what_each_is_alone(kind, form):
    tokenizer, template = bound(kind, form)

    @settings(BUDGET, max_examples=20)
    @given(
        st.lists(conversations(weights=True), max_size=5),
        st.sampled_from([20, 60, 10**6]),
        st.sampled_from(["right", "left"]),
    )
    def check(talks, limit, side):
        encoder = ConversationEncoder(tokenizer, template, limit, truncation_side=side)
        for conversation, found in zip(talks, encoder.many(talks), strict=True):
            try:
                alone = encode_conversation(tokenizer, template, conversation, limit, truncation_side=side)
            except RecordError as error:
                assert (found.reason, found.message) == (error.reason, error.message)
            else:
                assert (found.items[0][0].example(), found.cut) == alone

    check()


@some
def test_many_pairs_and_prompts_at_once_are_what_each_is_alone(kind, form):
    tokenizer, template = bound(kind, form)

    @settings(BUDGET, max_examples=20)
    @given(
        st.lists(st.tuples(conversations(weights=True), texts()), max_size=5),
        st.sampled_from([20, 60, 10**6]),
        st.sampled_from([1, 5, 10**6]),
    )
    def check(drawn, source, target):
        prompts = [first(talk, len(talk.messages) - 1) for talk, _ in drawn]
        pairs = [
            Preference(prompt, talk.messages[-1:], (Message("assistant", other),), "a:1")
            for prompt, (talk, other) in zip(prompts, drawn, strict=True)
        ]
        many = PreferenceEncoder(tokenizer, template, source, target).many(pairs)
        for pair, found in zip(pairs, many, strict=True):
            try:
                alone = encode_preference(tokenizer, template, pair, source, target)
            except RecordError as error:
                assert (found.reason, found.message) == (error.reason, error.message)
            else:
                assert tuple(row.example() for row in found.items[0]) == (alone[0].chosen, alone[0].rejected)
                assert (found.kind, len(found.items), found.cut) == ("PreferenceExample", 1, alone[1])
        for prompt, found in zip(prompts, PromptEncoder(tokenizer, template, source).many(prompts), strict=True):
            try:
                ids, kept = encode_prompt(tokenizer, template, prompt, source)
            except RecordError as error:
                assert (found.reason, found.message) == (error.reason, error.message)
            else:
                assert found.items[0][0].example().input_ids == ids
                assert found.cut == (kept.messages != prompt.messages)

    check()


@some
def test_pairs_share_their_prompt_and_keep_their_limits(kind, form):
    tokenizer, template = bound(kind, form)

    @BUDGET
    @given(conversations(), texts(), st.integers(20, 200), st.integers(1, 40))
    def check(conversation, other, source, target):
        prompt = first(conversation, len(conversation.messages) - 1)
        chosen, rejected = conversation.messages[-1:], (Message("assistant", other),)
        try:
            pair, _ = encode_preference(
                tokenizer, template, Preference(prompt, chosen, rejected, "a:1"), source, target
            )
        except RecordError as error:
            assert error.reason in ("prompt too long", "answers alike", "answers too long")
            return
        ids = encode_prompt(tokenizer, template, prompt, source)[0]
        assert len(ids) <= source
        for side in (pair.chosen, pair.rejected):
            assert side.input_ids[: len(ids)] == ids
            assert spans(side) == [(len(ids), len(side.input_ids))]
            assert len(side.input_ids) <= len(ids) + target
        assert pair.chosen.input_ids != pair.rejected.input_ids

    check()
