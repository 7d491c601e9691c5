"""What the model says to a few validation records."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from stagewise.data.examples import IGNORE_INDEX, Example
from stagewise.training.sample_generations import LONGEST, evenly_spread, greedy_answers, question_and_answer
from tests.conftest import adapter_weights
from tests.launching import run, torchrun
from tests.pair_runs import flags_of


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(10, 3, [1, 5, 8]), (3, 3, [0, 1, 2]), (2, 3, [0, 1]), (7, 1, [3]), (0, 3, []), (5, 0, [])],
)
def test_samples_are_spread_over_all_records(count, wanted, expected):
    assert evenly_spread(count, wanted) == expected


X = IGNORE_INDEX


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([X, X, 12, 13], ([10, 11], [12, 13], True)),
        ([X, 11, X, 13], ([10, 11, 12], [13], True)),  # of several answers the last one
        ([X, X, 12, X], ([10, 11], [12], True)),
        ([X, X, X, X], ([10, 11, 12, 13], [], True)),  # a prompt
        ([10, 11, 12, 13], ([10, 11], [12, 13], False)),  # a text
        ([X, 11, 12, 13], ([10, 11], [12, 13], False)),  # a text behind a start token
    ],
)
def test_the_question_is_what_stands_before_the_last_answer(labels, expected):
    assert question_and_answer(Example([10, 11, 12, 13], labels)) == expected


def test_of_a_long_text_a_beginning_is_gone_on_with():
    ids = list(range(400))
    before, after, answers = question_and_answer(Example(ids, ids))
    assert (before, after, answers) == (ids[:64], ids[64 : 64 + LONGEST], False)


def greedy(model, prompt, ends, longest):
    """The likeliest tokens one by one, each from a whole forward pass; the oracle."""
    ids = list(prompt)
    for _ in range(longest):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3_5", "mixtral"])
@pytest.mark.parametrize("adapted", [False, True])
def test_answers_are_the_likeliest_ones(tiny_model, tiny_tokenizer, family, adapted):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    model.generation_config.repetition_penalty = 5.0  # as published models bring along
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    model.config.use_cache = False  # as training leaves it
    prompts = [tokenizer.encode(text) for text in ("the user asks", "drink", "rest when you have a fever and")]
    model.train()
    found = greedy_answers(model, tokenizer, prompts, ["</s>"], longest=10)
    assert model.training, "left in the mode that it was in"
    model.eval()
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, ended = greedy(model, prompt, {tokenizer.eos_token_id}, 10)
        assert answer == (tokenizer.decode(tokens, skip_special_tokens=True), ended)


def test_an_answer_ends_at_the_templates_marker(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = tokenizer.encode("drink water")
    tokens, _ = greedy(model, prompt, set(), 12)
    marker = tokenizer.decode(tokens[4:5])
    at = tokens.index(tokenizer.encode(marker, add_special_tokens=False)[0])
    ((text, ended),) = greedy_answers(model, tokenizer, [prompt], [marker], longest=12)
    assert ended and text == tokenizer.decode(tokens[:at], skip_special_tokens=True)


def test_virtual_tokens_stand_before_the_prompt_once(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    prompts = [tokenizer.encode(text) for text in ("the user asks", "drink")]
    found = greedy_answers(model, tokenizer, prompts, [], longest=6)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, ended = greedy(model, prompt, {tokenizer.eos_token_id}, 6)
        assert answer == (tokenizer.decode(tokens, skip_special_tokens=True), ended)


# --- in the stages ---------------------------------------------------------------------------------------------------


def samples(folder, step):
    lines = (folder / "eval_samples" / f"step-{step}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def flags(tiny_checkpoint, tmp_path, out="out", **changes):
    found = {
        "model_name_or_path": tiny_checkpoint("llama"),
        "train_file_dir": "data/finetune/train",
        "validation_file_dir": "data/finetune/validation",
        "max_train_samples": 8,
        "max_eval_samples": 6,
        "model_max_length": 512,
        "output_dir": tmp_path / out,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        **changes,
    }
    return [word for name, value in found.items() if value is not None for word in (f"--{name}", value)]


def test_sft_shows_what_the_model_answers_at_each_evaluation(stage, tiny_checkpoint, tmp_path):
    out = stage("supervised_finetuning", *flags(tiny_checkpoint, tmp_path), "--eval_on_start")
    before, after = samples(out, 0), samples(out, 2)
    assert len(before) == 3 and [s["where"] for s in before] == [s["where"] for s in after]
    with open("data/finetune/validation/chinese.jsonl", encoding="utf-8") as file:
        chinese = [json.loads(line) for line in file]
    for first, last in zip(before, after, strict=True):
        assert first["prompt"] == last["prompt"]
        assert [text["label"] for text in last["texts"]] == ["answer", "reference"]
        record = chinese[int(first["where"].split(":")[1]) - 1]
        turns = [turn["value"] for turn in record["conversations"]]
        assert turns[-2] in first["prompt"] and turns[-1] not in first["prompt"]
        assert first["texts"][1]["text"].strip() == turns[-1]
    assert [s["texts"][0]["text"] for s in before] != [s["texts"][0]["text"] for s in after]


def test_samples_change_nothing_in_training(stage, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("llama")
    runs = [
        stage(
            "supervised_finetuning",
            *flags(tiny_checkpoint, tmp_path, f"out{count}", model_name_or_path=model, eval_samples=count),
            "--eval_on_start",
        )
        for count in (0, 3)
    ]
    assert not (runs[0] / "eval_samples").exists()
    one, two = map(adapter_weights, runs)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.distributed
@pytest.mark.parametrize("deepspeed", [None, "zero3.json"])
def test_two_processes_say_what_one_says(stage, tiny_checkpoint, tmp_path, deepspeed):
    """Also where each holds a part of the weights (ZeRO-3), so that both have to speak."""
    changes = {
        "model_name_or_path": tiny_checkpoint("llama"),
        "per_device_train_batch_size": 2,
        "deepspeed": deepspeed,
    }
    one = stage(
        "supervised_finetuning", *flags(tiny_checkpoint, tmp_path, **{**changes, "deepspeed": None}), "--eval_on_start"
    )
    run(torchrun("supervised_finetuning", *flags(tiny_checkpoint, tmp_path, "two", **changes), "--eval_on_start"))
    assert samples(tmp_path / "two", 0) == samples(one, 0)
    assert len(samples(tmp_path / "two", 2)) == 3


def test_pretraining_goes_on_with_a_text(stage, tiny_checkpoint, tmp_path):
    changes = {"train_file_dir": "data/pretrain/train", "validation_file_dir": "data/pretrain/validation"}
    words = flags(tiny_checkpoint, tmp_path, model_max_length=None, block_size=256, eval_samples=2, **changes)
    out = stage("pretraining", *words)
    for sample in samples(out, 2):
        answer, reference = sample["texts"]
        assert (answer["label"], reference["label"]) == ("answer", "reference") and reference["text"]


@pytest.mark.parametrize("script", ["reward_modeling", "dpo_training"])
def test_pairs_are_shown_with_their_rewards(stage, tiny_checkpoint, tmp_path, script):
    words = flags_of(tmp_path, tiny_checkpoint("llama"), save_strategy="no")
    out = stage(script, *words, "--save_eval_records")
    rows = map(json.loads, (out / "eval_records" / "step-2.jsonl").read_text().splitlines())
    rewards = {row["where"]: (row["chosen"], row["rejected"]) for row in rows}
    found = samples(out, 2)
    assert {sample["where"] for sample in found} == set(rewards) == {"b.jsonl:1", "b.jsonl:2"}
    for sample in found:
        texts = {text["label"]: text for text in sample["texts"]}
        assert list(texts) == (["answer"] if script == "dpo_training" else []) + ["chosen", "rejected"]
        assert (texts["chosen"]["score"], texts["rejected"]["score"]) == pytest.approx(rewards[sample["where"]])
    (sad,) = [sample for sample in found if "I feel sad" in sample["prompt"]]
    assert [text["text"].strip() for text in sad["texts"][-2:]] == [
        "talk to a friend or a doctor; you are not alone",
        "so what",
    ]


def test_ppo_shows_the_answers_that_were_scored(stage, tiny_checkpoint, tmp_path):
    words = flags(
        tiny_checkpoint,
        tmp_path,
        model_max_length=None,
        max_source_length=400,
        max_target_length=8,
        max_steps=None,
        reward_model_name_or_path=tiny_checkpoint("llama", task="score"),
        rollouts=1,
        batch_size=4,
    )
    out = stage("ppo_training", *words, "--save_eval_records")
    (path,) = (out / "eval_records").glob("answers-step-*.jsonl")
    answers = {a["where"]: a for a in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    (step,) = [int(p.stem.split("-")[1]) for p in (out / "eval_samples").glob("*.jsonl")]
    found = samples(out, step)
    assert len(found) == 3
    for sample in found:
        (text,) = sample["texts"]
        own = answers[sample["where"]]
        assert (text["text"], text["score"], text["ended"]) == (own["answer"], own["score"], own["ended"])


def test_a_prompt_that_leaves_no_room_in_the_context_is_passed_over(stage, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("gpt2", n_positions=512)  # positions beyond its table end the program
    out = stage("supervised_finetuning", *flags(tiny_checkpoint, tmp_path, model_name_or_path=model))
    path = out / "eval_samples" / "step-2.jsonl"
    assert not path.exists() or samples(out, 2)


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (-1, {}, "--eval_samples: expected 0 (none) or more, found -1"),
        (
            2,
            {"validation_file_dir": None, "max_eval_samples": None},
            "--eval_samples has no effect without evaluation",
        ),
    ],
)
def test_a_count_without_effect_is_refused(stage, tiny_checkpoint, tmp_path, capsys, count, changes, message):
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *flags(tiny_checkpoint, tmp_path, eval_samples=count, **changes))
    assert ended.value.code == 2 and message in capsys.readouterr().err
