"""The reward model reads an answer in its own form, whatever the policy's tokenizer."""

import json

import pytest
import torch

from stagewise.adapters.attach import attach_adapter
from stagewise.chat.select import choose_template
from stagewise.config.arguments import AdapterArguments, ChatArguments, ModelArguments
from stagewise.errors import RecordError, RewardError
from stagewise.formats.parsers import Conversation, Message
from stagewise.rl.reward_model import load_scorer
from tests.conftest import BOS_ID, EOS_ID, PAD_ID, build_tiny_model, build_tiny_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
OTHER_CHAT = CHAT.replace("'<' + m['role'] + '>'", "m['role'] + ': '").replace("<assistant>", "assistant: ")
PROMPTS = [
    Conversation((Message("user", "what helps against a fever"),), where="a:1"),
    Conversation((Message("user", "hello"), Message("assistant", "hi"), Message("user", "I sleep")), where="a:2"),
    Conversation((Message("user", "water"),), where="a:3"),
]
TEXTS = ["drink and rest", "at night, no screens at all", "drink"]
ENDED = [True, False, True]


@pytest.fixture
def policy():
    """The policy's tokenizer and template, prompts and answers as its tokens; the second answer did not end."""
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    template = choose_template(tokenizer, ChatArguments())

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    prompts = [
        ids("<user>what helps against a fever<assistant>"),
        ids("<user>hello<assistant>hi</s><user>I sleep<assistant>"),
        ids("<user>water<assistant>"),
    ]
    answers = [ids(text) + [EOS_ID] * ended for text, ended in zip(TEXTS, ENDED, strict=True)]
    return tokenizer, template, prompts, answers


def load(name, policy, label=None, dtype="float32", longest=100):
    tokenizer, template, _, _ = policy
    args = ModelArguments("anything", torch_dtype=dtype)
    return load_scorer(
        str(name), args, label=label, tokenizer=tokenizer, template=template,
        device=torch.device("cpu"), longest=longest,
    )  # fmt: skip


def scores_of(folder, rows, label=0):
    """Each row of ids through the saved classifier, alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, label] for row in rows])


def other_tokenizer(chat_template):
    """Another vocabulary: the ids of the policy's tokens mean something else here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["[PAD]", "[END]"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["sleep and screens at night, all of it"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]")
    made.chat_template, made.model_max_length = chat_template, 512
    return made


def test_an_answer_is_read_in_the_policys_form_where_the_reward_model_shares_it(policy, tiny_checkpoint):
    folder = tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT))
    scorer = load(folder, policy)
    assert scorer.policy_template is not None
    _, _, prompts, answers = policy
    # an answer that did not end is closed, since the model was trained on answers with their end marker
    rows = [p + a + [EOS_ID] * (not ended) for p, a, ended in zip(prompts, answers, ENDED, strict=True)]
    torch.testing.assert_close(scorer(PROMPTS, prompts, answers), scores_of(folder, rows), rtol=1e-4, atol=1e-5)


def test_an_answer_that_ended_otherwise_is_closed_by_the_end_marker(policy, tiny_checkpoint):
    """A tokenizer's end token may not be what the chat form ends an answer with."""
    scorer = load(tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT)), policy)
    tokenizer, _, prompts, _ = policy
    answer = tokenizer.encode("water")
    scorer.ends = frozenset({EOS_ID, BOS_ID})
    for end in ([EOS_ID], [BOS_ID], []):
        expected = {"input_ids": prompts[0] + answer + [EOS_ID]}
        assert scorer.encode(PROMPTS[0], prompts[0], answer + end) == expected


def test_sampled_tokens_that_spell_a_text_in_another_way_are_read_as_the_text(policy, tiny_checkpoint):
    """A reward model is trained on encoded texts: "drink" is three tokens there, never five letters."""
    scorer = load(tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT)), policy)
    tokenizer, _, prompts, _ = policy
    spelled = tokenizer.convert_tokens_to_ids(list("drink"))
    assert len(tokenizer.encode("drink")) < len(spelled)
    expected = prompts[2] + tokenizer.encode("drink") + [EOS_ID]
    assert scorer.encode(PROMPTS[2], prompts[2], [*spelled, EOS_ID]) == {"input_ids": expected}


def test_a_special_token_in_an_answer_is_seen_where_it_means_the_same(policy, tiny_checkpoint):
    scorer = load(tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT)), policy)
    tokenizer, _, prompts, _ = policy
    odd = [*tokenizer.encode("drink"), BOS_ID, *tokenizer.encode("rest"), EOS_ID]
    assert scorer.encode(PROMPTS[2], prompts[2], odd)["input_ids"] == prompts[2] + odd
    scorer.policy_template = None
    assert BOS_ID not in scorer.encode(PROMPTS[2], prompts[2], odd)["input_ids"]


def test_the_reward_model_reads_the_exchanges_that_the_policy_was_shown(policy, tiny_checkpoint):
    scorer = load(tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT)), policy)
    tokenizer, _, _, answers = policy
    shown = tokenizer.encode("<user>I sleep<assistant>")
    assert scorer.encode(PROMPTS[1], shown, answers[0])["input_ids"] == shown + answers[0]


def test_a_score_that_is_no_number_ends_the_run(policy, tiny_checkpoint):
    scorer = load(tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT)), policy)
    torch.nn.init.constant_(scorer.model.score.weight, torch.inf)
    with pytest.raises(RewardError, match="gave a score that is NaN or infinite; load it with --torch_dtype"):
        scorer(PROMPTS, *policy[2:])


def test_the_other_way_round_gives_the_same_scores(policy, tiny_checkpoint):
    """Decoded and encoded again, for texts that encode to the same tokens."""
    folder = tiny_checkpoint("llama", task="score", tokenizer=build_tiny_tokenizer(chat_template=CHAT))
    scorer = load(folder, policy)
    expected = scorer(PROMPTS, *policy[2:])
    scorer.policy_template = None
    torch.testing.assert_close(scorer(PROMPTS, *policy[2:]), expected)


def test_another_tokenizer_and_chat_form(policy, tiny_checkpoint):
    tokenizer = other_tokenizer(OTHER_CHAT)
    folder = tiny_checkpoint("qwen3", task="score", tokenizer=tokenizer)
    scorer = load(folder, policy)
    assert scorer.policy_template is None
    texts = [
        "user: what helps against a feverassistant: drink and rest[END]",
        "user: helloassistant: hi[END]user: I sleepassistant: at night, no screens at all[END]",
        "user: waterassistant: drink[END]",
    ]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    torch.testing.assert_close(scorer(PROMPTS, *policy[2:]), scores_of(folder, rows), rtol=1e-4, atol=1e-5)


def test_without_a_chat_form_prompt_and_answer_are_a_pair_of_texts(policy, tiny_checkpoint):
    tokenizer = other_tokenizer(None)
    folder = tiny_checkpoint("llama", task="score", tokenizer=tokenizer)
    questions = ["what helps against a fever", "hello\nhi\nI sleep", "water"]
    rows = [tokenizer(*pair)["input_ids"] for pair in zip(questions, TEXTS, strict=True)]
    assert rows[2] == tokenizer.encode("water") + tokenizer.encode("drink")
    torch.testing.assert_close(
        load(folder, policy)(PROMPTS, *policy[2:]), scores_of(folder, rows), rtol=1e-4, atol=1e-5
    )


def test_of_a_pair_that_is_too_long_the_end_of_the_question_is_kept(policy, tiny_checkpoint):
    tokenizer = other_tokenizer(None)
    scorer = load(tiny_checkpoint("llama", task="score", tokenizer=tokenizer), policy)
    question, answer = tokenizer.encode("what helps against a fever"), tokenizer.encode("drink and rest")
    scorer.tokenizer.model_max_length = len(answer) + 3
    assert scorer.encode(PROMPTS[0], [], policy[3][0])["input_ids"] == question[-3:] + answer
    scorer.tokenizer.model_max_length = len(answer)
    told = f"an answer alone has {len(answer)} of its tokens, --reward_model_name_or_path takes {len(answer)}; lower"
    with pytest.raises(RecordError, match=told):
        scorer.encode(PROMPTS[0], [], policy[3][0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_put_on_the_base_it_names(policy, tiny_checkpoint, tmp_path, dtype):
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    base = tiny_checkpoint("llama", tokenizer=tokenizer)
    from stagewise.models.loading import load_reward_model

    model = load_reward_model(ModelArguments(str(base), torch_dtype=dtype), tokenizer)
    model = attach_adapter(model, AdapterArguments(), "SEQ_CLS")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = load(tmp_path / "rm", policy, dtype=dtype)
    assert scorer.policy_template is not None
    assert {p.dtype for n, p in scorer.model.named_parameters() if "score" in n} == {torch.float32}
    _, _, prompts, answers = policy
    rows = [p + a + [EOS_ID] * (not ended) for p, a, ended in zip(prompts, answers, ENDED, strict=True)]
    with torch.no_grad():
        expected = [float(model.eval()(input_ids=torch.tensor([row])).logits) for row in rows]
    tolerance = 1e-4 if dtype == "float32" else 0.05  # of a batch's rounding in 16 bit
    assert scorer(PROMPTS, prompts, answers).tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_a_merged_model_in_16_bit_scores_in_float32(policy, tiny_checkpoint):
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    folder = tiny_checkpoint("llama", task="score", tokenizer=tokenizer, dtype=torch.bfloat16)
    scorer = load(folder, policy, dtype="bfloat16")
    assert (scorer.model.dtype, scorer.model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    assert scorer(PROMPTS, *policy[2:]).dtype == torch.float32


def test_one_of_several_labels(policy, tiny_checkpoint):
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    folder = tiny_checkpoint("llama", task="score", tokenizer=tokenizer)
    from transformers import AutoModelForSequenceClassification

    model = build_tiny_model("llama", task="score").config
    model.num_labels, model.id2label = 3, {0: "bad", 1: "fair", 2: "good"}
    AutoModelForSequenceClassification.from_config(model).save_pretrained(folder)
    with pytest.raises(
        RewardError, match=r"3 labels; --reward_label says which is the score: 0 \(bad\), 1 \(fair\), 2"
    ):
        load(folder, policy)
    with pytest.raises(RewardError, match="--reward_label 3: the reward model has 0"):
        load(folder, policy, label=3)
    _, _, prompts, answers = policy
    rows = [p + a + [EOS_ID] * (not ended) for p, a, ended in zip(prompts, answers, ENDED, strict=True)]
    for label in (0, 2):
        torch.testing.assert_close(
            load(folder, policy, label=label)(PROMPTS, prompts, answers), scores_of(folder, rows, label),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_a_classifier_without_a_pad_token_is_read_row_by_row(policy, tiny_checkpoint):
    """Its score stands at the last token, also where that is the token that pads elsewhere."""
    tokenizer = build_tiny_tokenizer(chat_template=CHAT, pad=False)
    folder = tiny_checkpoint("llama", task="score", tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    scorer = load(folder, policy)
    _, _, prompts, answers = policy
    rows = [p + a + [EOS_ID] * (not ended) for p, a, ended in zip(prompts, answers, ENDED, strict=True)]
    torch.testing.assert_close(scorer(PROMPTS, prompts, answers), scores_of(folder, rows), rtol=1e-4, atol=1e-5)


def test_a_history_that_is_too_long_loses_its_earliest_exchanges(policy, tiny_checkpoint):
    tokenizer = other_tokenizer(OTHER_CHAT)
    folder = tiny_checkpoint("llama", task="score", tokenizer=tokenizer)
    scorer = load(folder, policy)
    kept = scorer.encode(PROMPTS[1], policy[2][1], policy[3][1])["input_ids"]
    tokenizer_limit = len(kept) - 1
    scorer.tokenizer.model_max_length = tokenizer_limit
    shorter = scorer.encode(PROMPTS[1], policy[2][1], policy[3][1])["input_ids"]
    assert tokenizer.decode(shorter) == "user: I sleepassistant: at night, no screens at all[END]"
    scorer.tokenizer.model_max_length = 10
    with pytest.raises(RecordError, match=r"a:2: the last question with its answer has \d+ tokens, .* takes 10"):
        scorer.encode(PROMPTS[1], policy[2][1], policy[3][1])


def test_what_is_no_reward_model_is_refused_by_name(policy, tiny_checkpoint, tmp_path):
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    language_model = tiny_checkpoint("llama", tokenizer=tokenizer)
    with pytest.raises(RewardError, match=r"--reward_model_name_or_path .*: a language model, expected a sequence"):
        load(language_model, policy)
    from stagewise.models.loading import load_causal_lm

    adapter = attach_adapter(load_causal_lm(ModelArguments(str(language_model))), AdapterArguments(), "CAUSAL_LM")
    adapter.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="an adapter for CAUSAL_LM, expected a reward model's"):
        load(tmp_path, policy)
    with pytest.raises(RewardError, match=r"--reward_model_name_or_path \./nowhere"):
        load("./nowhere", policy)
    short = tiny_checkpoint("llama", task="score", tokenizer=tokenizer, max_position_embeddings=64)
    with pytest.raises(RewardError, match=r"reads 64 tokens, prompt and answer may have 100; lower --max_source"):
        load(short, policy)
    assert PAD_ID != EOS_ID
