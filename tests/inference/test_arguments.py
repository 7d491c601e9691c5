"""The flags of an answer, with transformers' own generate as the oracle."""

import re

import pytest
import torch

from stagewise.errors import ChatModelError
from stagewise.formats.parsers import Conversation, Message
from stagewise.inference.arguments import SamplingArguments
from stagewise.inference.chat_model import ChatModel, ChatModelArguments

ASKED = [Conversation((Message("user", text),)) for text in ("the user asks", "a", "drink water and rest when you")]
LENGTH = 16


@pytest.fixture
def speaker(tiny_checkpoint):
    """A speaker of letters that comes to an end now and then: one token in eight is an end marker."""
    found = ChatModel.load(ChatModelArguments(str(tiny_checkpoint("llama"))))
    found.stops = tuple(range(2, 300, 8))
    text = [found.tokenizer.decode([token]) for token in range(found.base.config.vocab_size)]
    odd = [token for token in range(3, len(text)) if not re.fullmatch("[a-zA-Z ]+", text[token])]
    found.base.generation_config.suppress_tokens = odd  # in a model's own file it is followed
    return found


def by_transformers(speaker: ChatModel, conversation: Conversation, **flags) -> list[int]:
    """What transformers' generate says to one prompt alone, up to its end."""
    prompt = torch.tensor([speaker.encode(conversation, LENGTH)])
    usual = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": list(speaker.stops), "pad_token_id": 0}
    flags = {**usual, **flags, "tokenizer": speaker.tokenizer}
    ids = speaker.base.generate(prompt, attention_mask=torch.ones_like(prompt), **flags)[0, prompt.shape[1] :].tolist()
    ends = [place for place, token in enumerate(ids) if token in speaker.stops]
    return ids[: ends[0] + 1] if ends else ids


def streamed(speaker: ChatModel, conversation: Conversation, sampling: SamplingArguments):
    """The answer as a terminal gets it, and its pieces joined."""
    stream, pieces = speaker.stream(conversation, sampling), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return end.value, "".join(pieces)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"min_new_tokens": 12},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": -2.0},
        {"num_beams": 3, "length_penalty": 0.0},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 4.0},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
        {"num_beams": 3, "min_new_tokens": 5, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_an_answer_is_that_of_generate_in_a_batch_and_as_a_stream(speaker, flags):
    sampling = SamplingArguments(max_new_tokens=LENGTH, **flags)
    expected = [by_transformers(speaker, each, **flags) for each in ASKED]
    answers = speaker.answers(ASKED, sampling, batch_size=3)
    assert [list(answer.token_ids) for answer in answers] == expected
    assert [answer.ended for answer in answers] == [ids[-1] in speaker.stops for ids in expected]
    for each, answer in zip(ASKED, answers, strict=True):
        assert streamed(speaker, each, sampling) == (answer, answer.text)
    if flags:
        fewer = {name: flags[name] for name in list(flags)[:-1]}
        assert expected != [by_transformers(speaker, each, **fewer) for each in ASKED]  # the last flag does something


@pytest.mark.parametrize("beams", [None, 3])
def test_texts_that_end_an_answer_are_no_part_of_it(speaker, beams):
    speaker.stops = (2,)
    flags = {"num_beams": beams, "length_penalty": -4.0} if beams else {}  # short ones win
    whole = speaker.answers(ASKED, SamplingArguments(max_new_tokens=LENGTH, **flags), batch_size=3)
    stops = [whole[0].text[4:6], whole[2].text[6:8], "never said"]
    sampling = SamplingArguments(max_new_tokens=LENGTH, stop_strings=stops, **flags)
    answers = speaker.answers(ASKED, sampling, batch_size=3)
    for each, answer in zip(ASKED, answers, strict=True):
        ids = by_transformers(speaker, each, stop_strings=stops, **flags)
        text = speaker.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ")  # the form's own space
        ends = [text.index(stop) for stop in stops if stop in text]
        assert answer.text == (text[: min(ends)] if ends else text)
        assert answer.ended == bool(ends)
        assert streamed(speaker, each, sampling) == (answer, answer.text)
    assert any(answer.ended for answer in answers)
    (marked,) = speaker.answers(ASKED[:1], SamplingArguments(max_new_tokens=1, stop_strings=["</s>"]), batch_size=1)
    assert marked.ended is False
    assert speaker._settings(SamplingArguments(stop_strings=["</s>", "<pad>"]))["stop_ids"] == [2, 0]


def test_a_text_that_begins_in_the_prompt_ends_nothing(speaker):
    speaker.stops = (2,)
    (whole,) = speaker.answers(ASKED[:1], SamplingArguments(max_new_tokens=LENGTH), batch_size=1)
    across = "SISTANT:" + speaker.tokenizer.decode(whole.token_ids[:1])  # transformers' own criterion would end here
    assert len(by_transformers(speaker, ASKED[0], stop_strings=[across])) == 1
    sampling = SamplingArguments(max_new_tokens=LENGTH, stop_strings=[across])
    assert speaker.answers(ASKED[:1], sampling, batch_size=1) == [whole]


def test_words_that_are_not_said(speaker):
    speaker.stops = (2,)
    plain = speaker.answers(ASKED, SamplingArguments(max_new_tokens=LENGTH), batch_size=3)
    ids = [answer.token_ids for answer in plain]
    words = [speaker.tokenizer.decode(ids[0][1:2]), speaker.tokenizer.decode(ids[1][2:4])]
    banned = [speaker.tokenizer.encode(form) for word in words for form in (word, f" {word}")]
    sampling = SamplingArguments(max_new_tokens=LENGTH, bad_words=words)
    found = speaker.answers(ASKED, sampling, batch_size=3)
    assert [list(a.token_ids) for a in found] == [by_transformers(speaker, c, bad_words_ids=banned) for c in ASKED]
    assert [answer.token_ids for answer in found] != ids
    assert streamed(speaker, ASKED[1], sampling)[0] == found[1]


@pytest.mark.parametrize(
    "flags",
    [
        {"typical_p": 0.3},
        {"top_h": 0.5},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8, "epsilon_cutoff": 0.01},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_what_transformers_draws_from(speaker, flags):
    """The shares of transformers' scores after its filters, against many draws of one token."""
    prompt = torch.tensor([speaker.encode(ASKED[0], LENGTH)])
    usual = {"do_sample": True, "max_new_tokens": 1, "top_k": 50, "pad_token_id": 0, "eos_token_id": 2}
    out = speaker.base.generate(
        prompt, attention_mask=torch.ones_like(prompt), output_scores=True, return_dict_in_generate=True,
        **{**usual, **flags},
    )  # fmt: skip
    shares = out.scores[0][0].softmax(-1)
    plain = speaker.base(prompt).logits[0, -1].topk(50).values.softmax(-1)
    assert 1 < (shares > 0).sum() < (plain > 0).sum()  # something is left out, and something left
    drawn = torch.zeros_like(shares)
    for seed in range(300):
        (answer,) = speaker.answers(ASKED[:1], SamplingArguments(max_new_tokens=1, seed=seed, **flags), batch_size=1)
        drawn[answer.token_ids[0]] += 1 / 300
    assert not drawn[shares == 0].any()
    assert (drawn - shares).abs().max() < 0.1


def test_a_marker_of_several_tokens_cannot_be_held_back(tiny_checkpoint):
    speaker = ChatModel.load(ChatModelArguments(str(tiny_checkpoint("llama"))))
    speaker.markers = ["<|end|>"]
    with pytest.raises(ChatModelError, match="--min_new_tokens: the end marker '<.end.>' is several tokens"):
        speaker.answers(ASKED, SamplingArguments(min_new_tokens=3), batch_size=1)
    speaker.answers(ASKED[:1], SamplingArguments(min_new_tokens=0, max_new_tokens=2), batch_size=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sample": False, "temperature": 0.7}, "--temperature has no effect with --do_sample False"),
        ({"do_sample": True, "temperature": 0}, "--temperature 0 always takes"),
        ({"temperature": 0, "top_p": 0.9}, "--top_p has no effect with --temperature 0"),
        ({"temperature": 0, "seed": 3}, "--seed has no effect on the most probable tokens"),
        ({"do_sample": False, "seed": 3}, "--seed has no effect on the most probable tokens"),
        ({"num_beams": 4, "seed": 3}, "--seed has no effect on the most probable tokens"),
        ({"temperature": 0.7, "num_beams": 3}, "--num_beams 3: beam search draws nothing"),
        ({"length_penalty": 2.0}, "--length_penalty has no effect without beam search: give --num_beams above 1"),
        ({"early_stopping": "never", "num_beams": 1}, "--early_stopping has no effect without beam search"),
        ({"early_stopping": "soon", "num_beams": 2}, "--early_stopping: expected True, False or never, found 'soon'"),
        ({"temperature": 0.5, "length_penalty": 2.0}, "--length_penalty has no effect without beam search"),
        ({"typical_p": 0.5, "do_sample": False}, "--typical_p has no effect with --do_sample False"),
        ({"epsilon_cutoff": 0.1, "temperature": 0}, "--epsilon_cutoff has no effect with --temperature 0"),
        ({"eta_cutoff": 0.1, "num_beams": 3}, "--num_beams 3: beam search draws nothing"),
        ({"typical_p": 0.0}, "--typical_p: expected above 0, at most 1, found 0.0"),
        ({"top_h": 2.0}, "--top_h: expected above 0, at most 1, found 2.0"),
        ({"eta_cutoff": 1.0}, "--eta_cutoff: expected 0 or more, below 1, found 1.0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "--min_new_tokens 9: more than --max_new_tokens 8"),
        ({"min_new_tokens": -1}, "--min_new_tokens: expected 0 or more, found -1"),
        ({"bad_words": ["a", " "]}, "--bad_words: expected words, found"),
        ({"stop_strings": [""]}, "--stop_strings: expected texts, found"),
        ({"top_p": 1.5}, "--top_p: expected above 0, at most 1, found 1.5"),
        ({"max_new_tokens": 0}, "--max_new_tokens: expected at least 1, found 0"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty: expected a number above 0"),
    ],
)
def test_settings_without_effect_are_refused(given, message):
    with pytest.raises(ChatModelError, match=message):
        SamplingArguments(**given).settled()


def test_what_is_not_given_is_the_models_own():
    from transformers import GenerationConfig

    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=100)
    found = SamplingArguments(top_p=0.5).settled(own)
    assert (found["do_sample"], found["temperature"], found["top_p"], found["max_new_tokens"]) == (True, 0.6, 0.5, 100)
    assert SamplingArguments(temperature=0).settled(own)["do_sample"] is False
    assert SamplingArguments(num_beams=2).settled(own)["do_sample"] is False
    assert SamplingArguments().settled()["do_sample"] is False
    assert SamplingArguments(top_k=3).settled()["do_sample"] is True
    own = GenerationConfig(typical_p=0.9, top_h=0.5, do_sample=True, stop_strings="X", length_penalty=2.0, num_beams=4)
    names = ("typical_p", "top_h", "stop_strings", "length_penalty", "num_beams")
    found = SamplingArguments().settled(own)
    assert [found[name] for name in names] == [0.9, 0.5, ["X"], None, 1]
    found = SamplingArguments(do_sample=False, stop_strings=["Y"]).settled(own)
    assert [found[name] for name in names] == [None, None, ["Y"], 2.0, 4]
    found = SamplingArguments(num_beams=2, early_stopping="true").settled()
    assert (found["early_stopping"], found["length_penalty"]) == (True, None)
    assert SamplingArguments(min_new_tokens=600).settled()["min_new_tokens"] == 600  # the model's own may allow it
    with pytest.raises(ChatModelError, match="--min_new_tokens 600: more than --max_new_tokens 512"):
        SamplingArguments(min_new_tokens=600).settled(GenerationConfig())
    alone = SamplingArguments(seed=3)  # before the model is known, its own settings may still sample
    assert (alone.settled()["do_sample"], alone.settled(own)["seed"]) == (False, 3)
    with pytest.raises(ChatModelError, match="--seed has no effect"):
        alone.settled(GenerationConfig())
