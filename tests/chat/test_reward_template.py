"""A reward model scores a conversation alike inside and outside of this project: at its last end marker."""

import json
import re
from pathlib import Path

import pytest
import torch
import trl
from loguru import logger
from tokenizers import AddedToken
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stagewise.chat.preference_encoding import encode_preference
from stagewise.chat.reward_template import (
    SCORED_AT,
    Ending,
    Reading,
    ending_at_marker,
    reading_of,
    set_pad_token,
    settle_reward_form,
    without_ending,
)
from stagewise.chat.select import TRAINED_IN, choose_template
from stagewise.chat.tokenizer_template import without_generation_marks
from stagewise.config.arguments import ChatArguments, ModelArguments, PairArguments
from stagewise.errors import ArgumentError
from stagewise.evaluation.pairs import encode_pair, load_pair_scorer
from stagewise.formats.parsers import Conversation, Message, Preference
from stagewise.rl.reward_model import load_scorer
from template import TEMPLATES
from tests.conftest import build_tiny_model
from tests.test_template import MARKERS, NAMES, llama_tokenizer

# The second answer begins with what some tokenizers join with the text before it.
TALKS = [
    ("what helps against a fever", "drink water and rest", "nothing"),
    ("and then", "\n\n- sleep\n- 多喝水 ", " see  a doctor"),
]
PADS = ("own pad token", "pads with the end marker", "no pad token")


def preferences():
    return [
        Preference(
            Conversation((Message("user", asked),), "Be kind.", where=f"a:{n}"),
            (Message("assistant", chosen),),
            (Message("assistant", rejected),),
            f"a:{n}",
        )
        for n, (asked, chosen, rejected) in enumerate(TALKS)
    ]


def conversations():
    """The same as others write them, each pair's chosen answer first."""
    system = {"role": "system", "content": "Be kind."}
    return [
        [system, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, *answers in TALKS
        for answer in answers
    ]


def tokenizer_of(tiny_tokenizer, pads, name="chatml"):
    """A tokenizer that has the special tokens of all families, with another pad token or none."""
    tokenizer = tiny_tokenizer(adds_bos=True, unk=True, pad=pads == PADS[0])
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    if pads == PADS[1]:
        tokenizer.pad_token = TEMPLATES[name].bind(tokenizer).stop
    return tokenizer


def saved(folder, tokenizer, family="llama", rows=None):
    """A tiny reward model with that tokenizer, as the merge writes it."""
    model = build_tiny_model(family, task="score", vocab_size=rows or len(tokenizer) + 8)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def outside(folder, padding_side=None):
    """What plain transformers gives the conversations, in a batch or each alone: the lines of docs/rm.md."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"return_tensors": "pt", "return_dict": True}
    with torch.no_grad():
        if padding_side is None:
            alone = [tokenizer.apply_chat_template(talk, **options) for talk in conversations()]
            return [model(**inputs).logits[0, 0].item() for inputs in alone]
        tokenizer.padding_side = padding_side
        inputs = tokenizer.apply_chat_template(conversations(), padding=True, **options)
        return model(**inputs).logits[:, 0].tolist()


def inside(folder, limit=400):
    """What evaluation.py gives them."""
    args = ModelArguments(str(folder), torch_dtype="float32")
    scorer = load_pair_scorer(args, None, ChatArguments(), torch.device("cpu"))
    pairs = [encode_pair(scorer, each, PairArguments(400, limit))[0].example for each in preferences()]
    return [score for pair in scorer(pairs, batch_size=2) for score in pair], pairs


def as_ppo(folder, tokenizer):
    """What PPO gives them as answers of a policy of that tokenizer; each answer is encoded alone, and ended."""
    template = choose_template(tokenizer, ChatArguments())
    scorer = load_scorer(
        str(folder), ModelArguments("policy", torch_dtype="float32"), label=None, tokenizer=tokenizer,
        template=template, device=torch.device("cpu"), longest=100,
    )  # fmt: skip
    stop = tokenizer.encode(template.stop, add_special_tokens=False)
    prompts = [each.prompt for each in preferences() for _ in range(2)]
    answers = [answer.strip() for _, *answers in TALKS for answer in answers]
    ids = [tokenizer.encode(answer, add_special_tokens=False) + stop for answer in answers]
    return scorer(prompts, [[]] * len(prompts), ids).tolist(), scorer


@pytest.fixture
def told():
    """The log's lines."""
    lines = []
    sink = logger.add(lines.append, format="{level} {message}")
    yield lines
    logger.remove(sink)


# --- one score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_scored_at_the_end_marker_inside_and_outside(name, pads, tiny_tokenizer, tmp_path):
    tokenizer = tokenizer_of(tiny_tokenizer, pads, name)
    template = choose_template(tokenizer, ChatArguments(template_name=name))
    settle_reward_form(tokenizer, template, len(tokenizer) + 8)
    folder = saved(tmp_path, tokenizer)
    expected, pairs = inside(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    stop = tokenizer.convert_tokens_to_ids(template.stop)
    for row, score in zip((row for pair in pairs for row in (pair.chosen, pair.rejected)), expected, strict=True):
        assert row.input_ids[-1] == stop
        with torch.no_grad():
            marker = model.score(model.model(torch.tensor([row.input_ids])).last_hidden_state[0, -1])
        assert score == pytest.approx(marker.item(), abs=1e-5)
    for padding_side in (None, "left", "right"):
        assert outside(folder, padding_side) == pytest.approx(expected, abs=1e-5), padding_side


@pytest.mark.parametrize("name", NAMES)
def test_ppo_reads_every_template_as_it_is_read_outside(name, tiny_tokenizer, tmp_path):
    """But for white space around an answer, which a policy's form may have of its own."""
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[1], name)
    settle_reward_form(tokenizer, choose_template(tokenizer, ChatArguments(template_name=name)), len(tokenizer) + 8)
    folder = saved(tmp_path, tokenizer)
    policy = AutoTokenizer.from_pretrained(folder)
    policy.chat_template = None
    policy.init_kwargs.pop(TRAINED_IN)
    policy.pad_token = policy.eos_token
    choose_template(policy, ChatArguments(template_name=name))
    found, scorer = as_ppo(folder, policy)
    assert scorer.policy_template is not None
    stripped = [[*talk[:-1], talk[-1] | {"content": talk[-1]["content"].strip()}] for talk in conversations()]
    rows = [scorer.tokenizer.apply_chat_template(talk, return_dict=False) for talk in stripped]
    with torch.no_grad():
        expected = [scorer.model(torch.tensor([row])).logits.item() for row in rows]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma", "bloom", "falcon", "gpt2", "qwen3_5"])
def test_other_families_are_scored_at_the_end_marker_too(family, tiny_tokenizer, tmp_path):
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[1])
    settle_reward_form(
        tokenizer, choose_template(tokenizer, ChatArguments(template_name="chatml")), len(tokenizer) + 8
    )
    folder = saved(tmp_path, tokenizer, family)
    expected = inside(folder)[0]
    assert outside(folder) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert outside(folder, "right") == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if family != "gpt2":  # whose positions transformers counts from the padding on the left
        assert outside(folder, "left") == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_tokenizer_that_puts_a_space_before_a_text(tmp_path):
    """Llama 2's kind, whose pieces encoded alone are not the whole text encoded at once."""
    tokenizer = llama_tokenizer()
    template = choose_template(tokenizer, ChatArguments(template_name="linly"))
    settle_reward_form(tokenizer, template, 512)
    folder = saved(tmp_path, tokenizer, rows=512)
    assert tokenizer.pad_token == "<unk>"
    expected = inside(folder)[0]
    for padding_side in (None, "left", "right"):
        assert outside(folder, padding_side) == pytest.approx(expected, abs=1e-5)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_cut_answer_is_closed_by_the_end_marker(tiny_tokenizer):
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[0])
    template = choose_template(tokenizer, ChatArguments(template_name="chatml"))
    ending = settle_reward_form(tokenizer, template, 999)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole, cut = encode_preference(tokenizer, template, preferences()[0], 99, 99, ending)
    assert not cut
    prompt = len(whole.chosen.input_ids) - sum(label != -100 for label in whole.chosen.labels)
    short, cut = encode_preference(tokenizer, template, preferences()[0], 99, 4, ending)
    assert cut
    assert short.chosen.input_ids == [*whole.chosen.input_ids[: prompt + 3], stop]
    # DPO's rows are not closed: it would learn to end there
    bare, _ = encode_preference(tokenizer, template, preferences()[0], 99, 4)
    assert bare.chosen.input_ids == whole.chosen.input_ids[: prompt + 4]


def test_a_form_that_ends_with_more_than_the_marker_closes_with_all_of_it(tiny_tokenizer):
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[0])
    template = choose_template(tokenizer, ChatArguments(template_name="rwkv"))
    ending = settle_reward_form(tokenizer, template, 999)
    assert ending == Ending("\n\n</s>", "")
    short, _ = encode_preference(tokenizer, template, preferences()[0], 99, 5, ending)
    assert tokenizer.decode(short.chosen.input_ids).endswith("\n\n</s>")


TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_the_end_of_a_published_template_is_left_off_behind_a_last_answer_alone(path, tiny_tokenizer):
    text, tokenizer = without_generation_marks(path.read_text(encoding="utf-8")), tiny_tokenizer()
    talk = [("user", "Hi"), ("assistant", "Hello <b> & so"), ("user", "Bye\n"), ("assistant", "Ciao\n\nx")]
    messages = [{"role": role, "content": content} for role, content in talk]

    def rendered(template, count, **options):
        return tokenizer.apply_chat_template(messages[:count], chat_template=template, tokenize=False, **options)

    if path.stem.startswith("llava"):
        pytest.skip("takes contents in parts alone")
    whole = rendered(text, 4)
    tail = whole[len(whole.rstrip("\n")) :] or "no such end"
    marked = ending_at_marker(text, tail)
    assert rendered(marked, 4) == whole.removesuffix(tail)
    assert rendered(marked, 3) == rendered(text, 3)
    assert rendered(marked, 3, add_generation_prompt=True) == rendered(text, 3, add_generation_prompt=True)
    assert without_ending(marked) == text.removesuffix("\n")


def test_the_end_comes_off_again_whatever_it_is():
    for tail in ("\n", '"\n\\', "é</s>", "{{ x }}"):
        assert without_ending(ending_at_marker("a{{ 1 }}\n ", tail)) == "a{{ 1 }}\n "
    assert without_ending("{{ 1 }}") == ending_at_marker("{{ 1 }}", "") == "{{ 1 }}"


# --- the pad token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pad", "added", "rows", "expected"),
    [
        ("<pad>", [], 320, "<pad>"),
        ("</s>", [], 320, "<pad>"),
        (None, ["<|finetune_right_pad_id|>"], 320, "<pad>"),
        ("</s>", ["<|image_pad|>"], 320, "<pad>"),
    ],
)
def test_the_pad_token_is_the_own_one_or_one_named_so(pad, added, rows, expected, tiny_tokenizer):
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    if pad:
        tokenizer.pad_token = pad
    set_pad_token(tokenizer, {2}, rows)
    assert tokenizer.pad_token == expected


def bare_tokenizer(specials, **named):
    """Byte-level, a letter a token, and these special tokens alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("Ġc", "u")]
    vocabulary = {token: n for n, token in enumerate([*letters, "Ġc", "Ġcu"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.mark.parametrize(
    ("specials", "named", "rows", "pad", "number"),
    [
        # the unknown token ends nothing; a reserved one; a row of the embedding that no token has; any special token
        (["<e>", "<u>", "<r>"], {"eos_token": "<e>", "unk_token": "<u>", "pad_token": "<e>"}, 300, "<u>", 259),
        (["<e>", "<|reserved_7|>"], {"eos_token": "<e>", "pad_token": "<e>"}, 300, "<|reserved_7|>", 259),
        (["<e>", "<b>"], {"eos_token": "<e>", "bos_token": "<b>"}, 261, "<|pad|>", 260),
        (["<e>", "<image>", "<b>"], {"eos_token": "<e>", "bos_token": "<b>"}, 261, "<b>", 260),
        # GPT-2's kind: one special token, and no row to spare; what is spelled as no text is
        (["<e>"], {"eos_token": "<e>", "bos_token": "<e>", "unk_token": "<e>", "pad_token": "<e>"}, 259, "Ġcu", 257),
    ],
)
def test_a_pad_token_is_found_in_every_vocabulary(specials, named, rows, pad, number, tmp_path):
    tokenizer = bare_tokenizer(specials, **named)
    end = tokenizer.convert_tokens_to_ids("<e>")
    before = tokenizer.encode(" cure, Ġ cu")
    set_pad_token(tokenizer, {end}, rows)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, number)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token, again.pad_token_id) == (pad, number)
    assert again.encode(" cure, Ġ cu") == before


def test_without_any_other_token_it_is_an_error():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"</s>": 0})), eos_token="</s>")
    with pytest.raises(ArgumentError, match="no token besides the end marker .* name a pad_token"):
        set_pad_token(tokenizer, {0}, 1)


# --- what was made before, and elsewhere -----------------------------------------------------------------------------


def older(folder, tokenizer, name="chatml", **manifest):
    """A reward model from before: the end marker pads, the template has its newline, pieces were encoded alone."""
    template = choose_template(tokenizer, ChatArguments(template_name=name))
    assert template.tail == "\n"
    saved(folder, tokenizer)
    (folder / "run.json").write_text(json.dumps({"stage": "merge", "lineage": [], **manifest}))
    return template


def test_an_older_reward_model_is_read_as_it_was_trained_and_that_is_said(tiny_tokenizer, tmp_path, told):
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[1])
    template = older(tmp_path, tokenizer)
    assert reading_of(AutoTokenizer.from_pretrained(tmp_path), tmp_path) is Reading.OLDER
    scores, pairs = inside(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = [row.input_ids for pair in pairs for row in (pair.chosen, pair.rejected)]
    alone = [encode_preference(tokenizer, template, each, 400, 400)[0] for each in preferences()]
    assert rows == [row.input_ids for pair in alone for row in (pair.chosen, pair.rejected)]
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0] for row in rows]
        words = [model.score(state[-2]).item() for state in states]  # at the token before the end marker
    assert scores == pytest.approx(words, abs=1e-5)
    found, _ = as_ppo(tmp_path, tokenizer)
    assert found[0] == pytest.approx(words[0], abs=1e-5)  # an answer without white space around it
    warnings = [line for line in told if line.startswith("WARNING")]
    assert len(warnings) == 2  # evaluation, PPO
    for line in warnings:
        assert f"reward model {tmp_path}: from an older version" in line
        assert "at the token before the end marker '<|im_end|>', which is its pad token, too" in line
        assert "reward_modeling.py --peft_path" in line


def test_an_older_one_with_its_own_pad_token_is_told_by_its_template(tiny_tokenizer, tmp_path, told):
    older(tmp_path, tokenizer_of(tiny_tokenizer, PADS[0]))
    inside(tmp_path)
    (line,) = [line for line in told if line.startswith("WARNING")]
    assert "at the end marker '<|im_end|>', behind which its chat template writes '\\n'" in line


def test_a_classifier_made_elsewhere_is_read_as_its_template_writes_it(tiny_tokenizer, tmp_path, told):
    """With the newline behind the end marker, which it was trained with."""
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[0])
    older(tmp_path, tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config[TRAINED_IN]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "run.json").unlink()
    assert reading_of(AutoTokenizer.from_pretrained(tmp_path), tmp_path) is Reading.PLAIN
    plain = outside(tmp_path)
    assert inside(tmp_path)[0] == pytest.approx(plain, abs=1e-5)
    assert as_ppo(tmp_path, tokenizer)[0][0] == pytest.approx(plain[0], abs=1e-5)
    assert not [line for line in told if line.startswith("WARNING")]
    assert inside(tmp_path, limit=4)[1][0].chosen.input_ids[-1] == tokenizer.encode("\n")[-1]


def test_a_classifier_that_others_trained_on_a_model_of_this_project_is_theirs(tiny_tokenizer, tmp_path):
    older(tmp_path, tokenizer_of(tiny_tokenizer, PADS[0]))
    (tmp_path / "run.json").unlink()
    assert reading_of(AutoTokenizer.from_pretrained(tmp_path), tmp_path) is Reading.PLAIN


def test_the_notes_of_a_reward_model_are_saved_and_taken_back(tiny_tokenizer, tmp_path):
    tokenizer = tokenizer_of(tiny_tokenizer, PADS[1])
    template = choose_template(tokenizer, ChatArguments(template_name="chatml"))
    settle_reward_form(tokenizer, template, 999)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.init_kwargs[SCORED_AT] == "<|im_end|>"
    assert again.apply_chat_template(conversations()[0], tokenize=False).endswith("rest<|im_end|>")
    # a language model's stage continues in the form itself
    assert choose_template(again, ChatArguments()) == template
    assert again.chat_template == template.jinja() and SCORED_AT not in again.init_kwargs
    assert re.search(r"<\|im_end\|>\n$", again.apply_chat_template(conversations()[0], tokenize=False))
