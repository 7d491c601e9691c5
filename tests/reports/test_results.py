"""What a person looks at: samples with their labels marked."""

import io

import pytest
from loguru import logger

from stagewise.data.examples import IGNORE_INDEX, Example
from stagewise.reports.results import has_color, mark_labels, show_sample
from tests.tools.test_show_data import byte_tokenizer

GREEN, GREY, OFF = "\033[32m", "\033[90m", "\033[0m"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def example(tokenizer, *parts: tuple[str, bool]) -> Example:
    """An example of parts of text that are learned or not."""
    ids = [tokenizer.encode(text) for text, _ in parts]
    labels = [part if learn else [IGNORE_INDEX] * len(part) for part, (_, learn) in zip(ids, parts, strict=True)]
    together = [[number for part in parts for number in part] for parts in (ids, labels)]
    return Example(*together, "a.jsonl:1")


def test_what_is_learned_stands_between_marks(tokenizer):
    sample = example(tokenizer, ("Q: why\n", False), (" so </s>", True), ("\nQ: and\n", False), ("yes", True))
    assert mark_labels(tokenizer, sample, color=False) == "Q: why\n« so </s>»\nQ: and\n«yes»"


def test_what_is_learned_is_green_and_the_rest_grey(tokenizer):
    sample = example(tokenizer, ("Q\n", False), ("yes", True))
    assert mark_labels(tokenizer, sample, color=True) == f"{GREY}Q\n{OFF}{GREEN}yes{OFF}"


def test_letters_of_several_tokens_are_whole(tokenizer):
    sample = example(tokenizer, ("感冒？", False), ("休息。", True))  # three bytes, and tokens, a letter
    assert mark_labels(tokenizer, sample, color=False) == "感冒？«休息。»"


def test_the_middle_of_long_stretches_is_left_out(tokenizer):
    sample = example(tokenizer, ("a" * 30 + "b" * 30, False), ("c" * 50, True))
    # 60 characters are longer than 10 and the room that the note takes; 50 are not.
    assert mark_labels(tokenizer, sample, color=False, longest=10) == f"aaaaa [… 50 characters …] bbbbb«{'c' * 50}»"
    assert mark_labels(tokenizer, sample, color=False) == f"{'a' * 30}{'b' * 30}«{'c' * 50}»"


def test_a_space_that_a_tokenizer_drops_at_the_start_of_a_text_is_kept():
    """SentencePiece decodes "▁so" alone to "so", which would hide whether the space is learned."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁why": 1, "▁so": 2}
    raw = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert tokenizer.decode([2]) == "so"
    sample = Example([1, 2], [IGNORE_INDEX, 2])
    assert mark_labels(tokenizer, sample, color=False) == "why« so»"


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_color(Terminal()) and not has_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # as no-color.org has it: empty is as if it were not set
    assert has_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_color(Terminal())


def test_the_sample_in_the_log_says_where_it_is_from(tokenizer):
    said: list[str] = []
    number = logger.add(said.append, format="{message}")
    try:
        show_sample(tokenizer, example(tokenizer, ("{Q} <b>\n", False), ("yes", True)))
    finally:
        logger.remove(number)
    assert "".join(said) == "one training sample (a.jsonl:1), labels marked:\n{Q} <b>\n«yes»\n\n"
