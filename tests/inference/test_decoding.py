"""What a row draws from, and ids that become words."""

import pytest
import torch

from stagewise.inference.decoding import FILTERS, RowChoice, StopOnText, TextStream, overlap
from tests.conftest import build_tiny_tokenizer


def settings(**values):
    usual = {**dict.fromkeys(FILTERS), "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return {**usual, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": [], **values}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}),
        ({"top_k": 2}, {0: 2 / 3, 1: 1 / 3}),
        ({"top_p": 0.7}, {0: 2 / 3, 1: 1 / 3}),
        ({"min_p": 0.25}, {0: 5 / 9, 1: 2.5 / 9, 2: 1.5 / 9}),  # 0.1 is less than a quarter of 0.5
        # surprises 0.69, 1.39, 1.90, 2.30; their mean is 1.21: 1 is nearest, then 0
        ({"typical_p": 0.2}, {1: 1}),
        ({"typical_p": 0.7}, {0: 2 / 3, 1: 1 / 3}),
        ({"epsilon_cutoff": 0.12}, {0: 5 / 9, 1: 2.5 / 9, 2: 1.5 / 9}),
        # the least of 0.12 and sqrt(0.12) · exp(-1.21) = 0.103
        ({"eta_cutoff": 0.12}, {0: 5 / 9, 1: 2.5 / 9, 2: 1.5 / 9}),
        ({"eta_cutoff": 0.1}, {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}),  # the least is 0.094
        # two tokens have 0.64 nats of entropy among themselves, three 0.94, all 1.21
        ({"top_h": 0.7}, {0: 2 / 3, 1: 1 / 3}),
        ({"bad_words_ids": [[0], [3]]}, {1: 0.25 / 0.4, 2: 0.15 / 0.4}),
        ({"bad_words_ids": [[0, 1]]}, {0: 0.5 / 0.75, 2: 0.15 / 0.75, 3: 0.1 / 0.75}),  # 0 was said
        ({"temperature": 0.5}, {0: 0.25 / 0.345, 1: 0.0625 / 0.345, 2: 0.0225 / 0.345, 3: 0.01 / 0.345}),  # squares
        ({"repetition_penalty": 2.0}, {1: 0.25 / 0.75, 0: 0.25 / 0.75, 2: 0.15 / 0.75, 3: 0.1 / 0.75}),  # 0 was said
    ],
)
def test_shares_that_are_drawn_from(given, kept):
    scores = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    numbers = (torch.arange(2000) + 0.5) / 2000
    drawn = torch.zeros(4)
    for number in numbers[::4]:
        choice = RowChoice([[0, 0]], 1, number.view(1, 1), settings(**given))
        one = choice(torch.tensor([[0, 0]]), scores.clone())
        assert (one > -torch.inf).sum() == 1
        drawn[one.argmax()] += 1 / 500
    expected = torch.tensor([kept.get(token, 0.0) for token in range(4)])
    if "repetition_penalty" in given:  # log 0.5 · 2 = log 0.25
        expected = torch.tensor([0.25, 0.25, 0.15, 0.1]) / 0.75
    assert torch.allclose(drawn, expected, atol=0.01), drawn


def test_penalties_do_not_see_padding():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    choice = RowChoice([[2]], 1, None, settings(repetition_penalty=2.0))
    # the row is padded with 1, which was not said
    assert choice(torch.tensor([[1, 1, 2]]), scores).tolist() == [[0.0, 1.0, 1.0]]
    choice = RowChoice([[2, 0, 2]], 1, None, settings(no_repeat_ngram_size=2))
    assert choice(torch.tensor([[1, 2, 0, 2]]), scores).tolist() == [[-torch.inf, 1.0, 2.0]]


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def words_of(text: str, **around):
    tokenizer = build_tiny_tokenizer()
    words = TextStream(tokenizer, (2,), around.get("before", ""), around.get("after", ""), around.get("strings", ()))
    pieces = [words.add(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
    return [piece for piece in [*pieces, words.rest()] if piece], words


def test_pieces_hold_whole_characters():
    # the tokenizer has bytes alone for these: 3 a Chinese character, 4 a smile
    assert words_of("你好🙂!")[0] == ["你", "好", "🙂", "!"]
    tokenizer = build_tiny_tokenizer()
    first_bytes = tokenizer("好", add_special_tokens=False).input_ids[:2]
    cut, ended = (TextStream(tokenizer, (2,), "", "", ()) for _ in range(2))
    for words in (cut, ended):
        assert [words.add(token) for token in first_bytes] == ["", ""]
    assert cut.rest() == ""  # stopped within a character
    assert ended.add(2) == "\ufffd"  # the model itself ended there


def test_a_stop_string_that_ends_within_a_token():
    from types import SimpleNamespace

    pieces = [b"\xe5\xa5\xbd", b"\xe5\x81\x9c", b"\xe6\xad\xa2\xe4", b""]  # 好, 停, 止 with a byte more, padding
    tokenizer = SimpleNamespace(decode=lambda ids, **_: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    words = TextStream(tokenizer, (), "", "", ("停止",))
    assert [words.add(token) for token in (0, 1)] == ["好", ""]
    assert (words.add(2), words.ended) == ("", True)  # there, not at the padding of its batch
    assert (words.add(3), words.rest()) == ("", "")
    ends = StopOnText(tokenizer, ["停止"], 0)
    assert ends(torch.tensor([[0, 1, 2], [0, 0, 1]]), None).tolist() == [True, False]


def test_the_forms_own_space_and_the_end_marker_are_no_words():
    pieces, words = words_of(" Hi there </s>Not this", before=" ", after=" ")
    assert ("".join(pieces), words.ended) == ("Hi there", True)
    pieces, _ = words_of("Hi ", after=" ")
    assert "".join(pieces) == "Hi"
    pieces, words = words_of("Yes<|end|>No", strings=("<|end|>",))
    assert ("".join(pieces), words.ended) == ("Yes", True)
    pieces, words = words_of("a < b <|en", strings=("<|end|>",))
    assert ("".join(pieces), words.ended) == ("a < b <|en", False)
    assert (overlap("abc<|e", "<|end|>"), overlap("abc", "<|end|>")) == (3, 0)
