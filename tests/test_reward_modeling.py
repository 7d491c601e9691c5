import copy
import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_modeling import RewardTrainer
from stagewise.adapters.attach import attach_adapter
from stagewise.artifacts.checkpoints import mark_whole
from stagewise.config.arguments import AdapterArguments
from stagewise.data.packing import PreferenceCollator
from stagewise.training.settings import StageArguments
from template import TEMPLATES
from tests.conftest import adapter_weights
from tests.pair_runs import (
    batch_of,
    both_agree,
    chat_columns,
    evaluation_rows,
    flags_of,
    history,
    manifest,
    preferences,
)


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    def make(out="out", model=None, **changes):
        return flags_of(tmp_path, model or tiny_checkpoint("llama"), out, **changes)

    return make


def trainer_of(model, tokenizer, folder, **changes):
    args = StageArguments(str(folder / "ours"), use_cpu=True, report_to="none", **changes)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    rows = preferences(tokenizer)
    return RewardTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_adapter(model):
    """A LoRA adapter and a score head that are trained, the adapter no longer at zero."""
    wrapped = attach_adapter(model, AdapterArguments(lora_dropout=0.0), "SEQ_CLS")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return wrapped


@pytest.mark.parametrize("adapter", [False, True])
def test_loss_and_gradients_are_those_of_trl(tiny_model, tiny_tokenizer, tmp_path, adapter):
    from trl import RewardConfig
    from trl import RewardTrainer as Oracle

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["vicuna"].jinja()
    model = tiny_model("llama", task="score")
    model = with_adapter(model) if adapter else model
    config = RewardConfig(
        str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=False,
        report_to="none",
    )
    oracle = Oracle(
        model=copy.deepcopy(model),
        args=config,
        train_dataset=Dataset.from_list(chat_columns(0, 4)),
        processing_class=tokenizer,
    )
    expected = oracle.compute_loss(oracle.model, oracle.data_collator(list(oracle.train_dataset)))
    expected.backward()
    ours = trainer_of(model, tokenizer, tmp_path)
    loss = ours.compute_loss(model, batch_of(tokenizer, 0, 4), num_items_in_batch=4)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found, wanted = gradients(model), gradients(oracle.model)
    assert found.keys() == wanted.keys()
    assert any("score" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_score_is_read_at_each_rows_own_last_token(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_model("llama", task="score")
    ours = trainer_of(model, tokenizer, tmp_path)
    pairs = preferences(tokenizer, 0, 3)
    with torch.no_grad():
        chosen, rejected = ours.rewards(model, PreferenceCollator(tokenizer.pad_token_id)(pairs))
        for number, pair in enumerate(pairs):
            for row, reward in ((pair.chosen, chosen[number]), (pair.rejected, rejected[number])):
                hidden = model.model(torch.tensor([row.input_ids])).last_hidden_state[0, -1]
                torch.testing.assert_close(reward, model.score(hidden)[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_pairs_however_they_are_dealt_out(stage, words, tiny_checkpoint):
    model = tiny_checkpoint("llama", task="score")
    order = {"train_sampling_strategy": "sequential", "max_steps": 1, "max_train_samples": 5, "model": model}
    order |= {"optim": "sgd", "learning_rate": 0.1}
    whole = stage("reward_modeling", *words("whole", per_device_train_batch_size=5, **order))
    # two batches of two and one of one: a mean of batch means would count the fifth pair twice
    parts = stage("reward_modeling", *words("parts", gradient_accumulation_steps=3, **order))
    logs = [manifest(folder)["metrics"]["train"]["train_loss"] for folder in (whole, parts)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    expected = adapter_weights(whole)
    for name, value in adapter_weights(parts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_what_is_saved_gives_the_rewards_that_were_measured(stage, words, full):
    flags = words(use_peft=not full, lora_dropout=None if full else 0)
    out = stage("reward_modeling", *flags, "--eval_on_start", "--save_eval_records")
    tokenizer = AutoTokenizer.from_pretrained(out)
    if full:
        model = AutoModelForSequenceClassification.from_pretrained(out)
    else:
        assert any(name.endswith("score.weight") for name in adapter_weights(out))
        base = AutoModelForSequenceClassification.from_pretrained(flags[1], num_labels=1, pad_token_id=0)
        model = PeftModel.from_pretrained(base, out)
    measured, before = evaluation_rows(out, 2), evaluation_rows(out, 0)
    assert list(measured) == list(before) and sorted(measured) == ["b.jsonl:1", "b.jsonl:2"]
    for number, pair in enumerate(preferences(tokenizer, 6, 8), 1):
        with torch.no_grad():
            found = [model.eval()(torch.tensor([row.input_ids])).logits.item() for row in (pair.chosen, pair.rejected)]
        assert found == pytest.approx(measured[f"b.jsonl:{number}"], rel=1e-4, abs=1e-5)
        assert found != pytest.approx(before[f"b.jsonl:{number}"], rel=1e-2)
    metrics = manifest(out)["metrics"]["eval"]
    margins = [chosen - rejected for chosen, rejected in measured.values()]
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 2)
    assert metrics["eval_accuracy"] == sum(margin > 0 for margin in margins) / 2


def test_a_run_learns_its_pairs_and_logs_accuracy_and_margin(stage, words):
    out = stage("reward_modeling", *words(max_steps=12, logging_steps=3, validation_file_dir=None, learning_rate=3e-2))
    logs = [log for log in history(out) if "accuracy" in log]
    # a log of three steps of two is one pass over the six pairs
    assert logs[-1]["accuracy"] == 1.0
    assert logs[-1]["margin"] > 1
    for log in logs:
        assert log["margin"] == pytest.approx(log["chosen_reward"] - log["rejected_reward"], abs=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(stage, words, tmp_path, tiny_checkpoint):
    # two epochs of three steps each, with dropout and in an order of its own in each epoch
    changes = {"max_steps": 6, "lora_dropout": 0.1, "train_sampling_strategy": "group_by_length"}
    changes["model"] = tiny_checkpoint("llama")
    whole = stage("reward_modeling", *words("whole", save_steps=4, **changes))
    (tmp_path / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = stage("reward_modeling", *words("resumed", **changes), "--resume_from_checkpoint", "True")
    expected, found = adapter_weights(whole), adapter_weights(resumed)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not torch.equal(found[key := min(found)], adapter_weights(whole / "checkpoint-4")[key])


def test_the_head_of_a_16_bit_model_is_trained_in_float32(stage, words, tiny_checkpoint):
    base = tiny_checkpoint("llama", dtype=torch.bfloat16)
    weights = adapter_weights(stage("reward_modeling", *words(model=base, learning_rate=1e-4)))
    head = next(value for name, value in weights.items() if name.endswith("score.weight"))
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())


@pytest.mark.parametrize(
    ("source", "target", "kept", "cut"),
    [
        # prompts of 173 (143 without its history), 139, 137, 136, 137 and 139 tokens
        (143, 400, 6, 1),
        (137, 4, 3, 3),  # a half is too long: no error, and nothing has to be asked for
    ],
)
def test_what_is_too_long_is_cut_or_counted(stage, words, source, target, kept, cut):
    limits = {"max_source_length": source, "max_target_length": target, "max_steps": 1}
    out = stage("reward_modeling", *words(validation_file_dir=None, **limits))
    account = manifest(out)["data"]["train"]
    assert (account["read"], account["kept"], account["cut"]) == (6, kept, cut)
    assert account["left_out"] == ({"prompt too long": 6 - kept} if kept < 6 else {})


def test_evaluation_between_steps_does_not_turn_training_off(stage, words):
    out = stage("reward_modeling", *words(eval_strategy="steps", eval_steps=1))
    assert manifest(out)["steps"] == 2
    assert [log["step"] for log in history(out) if "eval_accuracy" in log] == [1, 2]


@pytest.mark.distributed
def test_two_processes_are_one_with_twice_the_batch(stage, words, tmp_path, tiny_checkpoint):
    both_agree("reward_modeling", stage, words, tiny_checkpoint("llama", task="score"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_target_length": 0}, "--max_target_length: expected at least 1, found 0"),
        ({"use_peft": False, "lora_dropout": None, "lora_rank": 4}, "--lora_rank belongs to an adapter"),
        ({"beta": 0.1}, "--beta: no such flag"),
        ({"block_size": 128}, "--block_size: no such flag"),
        ({"train_sampling_strategy": "batch_rebalance"}, "--train_sampling_strategy batch_rebalance: not in this"),
    ],
)
def test_a_flag_that_cannot_be_honoured_ends_before_the_model_is_looked_for(stage, words, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        stage("reward_modeling", *words(model="nowhere/at/all", **changes))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_family_without_a_scalar_head_is_refused_by_name(stage, words, tiny_checkpoint, capsys):
    config = (folder := tiny_checkpoint("llama")) / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"cohere"'))
    with pytest.raises(SystemExit):
        stage("reward_modeling", *words(model=folder))
    assert "no sequence-classification class for 'cohere'" in capsys.readouterr().err


def plain_scores(folder, padding_side):
    """Each validation pair's (chosen, rejected) as docs/rm.md reads them, in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = chat_columns(6, 8)
    talks = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    inputs = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        scores = model(**inputs).logits[:, 0].tolist()
    return {f"b.jsonl:{n // 2 + 1}": tuple(scores[n : n + 2]) for n in range(0, len(scores), 2)}


def documented_score(folder, language):
    """What the lines of docs/rm.md print of a merged directory, and the conversation in them."""
    page = (Path(__file__).resolve().parent.parent / "docs" / f"rm{language}.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names, printed = {}, io.StringIO()
    with redirect_stdout(printed):
        exec(lines.replace("outputs/rm-merged", str(folder)), names)
    return float(printed.getvalue()), names["talk"]


def check_scores_outside(stage, words, merge, **flags):
    """The merged directory gives plain transformers the scores that the run recorded, and says so nowhere else."""
    out = stage("reward_modeling", *words(**flags), "--save_eval_records")
    merged = merge(out)
    for padding_side in ("left", "right"):
        found = plain_scores(merged, padding_side)
        for where, scores in evaluation_rows(out, 2).items():
            assert found[where] == pytest.approx(scores, abs=1e-5), (padding_side, where)
    return out, merged


@pytest.fixture
def merge(tmp_path):
    def run(adapter, *words):
        import merge_peft_adapter

        folder = tmp_path / "merged"
        merge_peft_adapter.main(["--lora_model", str(adapter), "--output_dir", str(folder), *map(str, words)])
        return folder

    return run


def test_what_is_merged_gives_plain_transformers_the_same_scores(
    stage, words, merge, tiny_checkpoint, tiny_tokenizer, capsys
):
    tokenizer = tiny_tokenizer(pad=False, unk=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    base = tiny_checkpoint("llama", tokenizer=tokenizer)
    out, merged = check_scores_outside(stage, words, merge, model=base, template_name="chatml")
    saved = AutoTokenizer.from_pretrained(merged)
    assert (saved.pad_token, saved.eos_token) == ("<pad>", "<|im_end|>")
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == 0
    score, talk = documented_score(merged, "")
    assert documented_score(merged, "_zh") == (score, talk)
    rewarded = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    ids = saved.encode(f"<|im_start|>user\n{talk[0]['content']}<|im_end|>\n<|im_start|>assistant\nSleep.<|im_end|>")
    with torch.no_grad():
        marker = rewarded.score(rewarded.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
    assert score == pytest.approx(marker, abs=1e-5)
    # the base's own tokenizer in place of the adapter's gets the same pad token and template
    shutil.rmtree(merged)
    merge(out, "--tokenizer_path", base)
    assert AutoTokenizer.from_pretrained(merged).chat_template == saved.chat_template
    assert AutoTokenizer.from_pretrained(merged).pad_token == "<pad>"
    # training continues from both in the same rows
    rows = [manifest(out)["data"]["train"]]
    for number, start in enumerate(({"model": merged}, {"model": base, "peft_path": out})):
        again = stage("reward_modeling", *words(f"again{number}", lora_dropout=None, **start))
        rows.append(manifest(again)["data"]["train"])
    assert rows[0]["kept"] == rows[1]["kept"] == rows[2]["kept"]
    assert "older version" not in capsys.readouterr().err


def test_an_older_adapter_is_told_where_it_is_merged_or_gone_on_from(stage, words, merge, tiny_checkpoint, capsys):
    base = tiny_checkpoint("llama")
    out = stage("reward_modeling", *words(model=base, template_name="alpaca"))
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["stagewise_scored_at"]
    path.write_text(json.dumps(config | {"pad_token": "</s>"}))
    (out / "chat_template.jinja").write_text(TEMPLATES["alpaca"].bind(AutoTokenizer.from_pretrained(base)).jinja())
    capsys.readouterr()
    merged = merge(out)
    told = f"reward model {out}: from an older version: its score is read at the token before the end marker '</s>'"
    assert told in capsys.readouterr().err
    # it stays as it was trained
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == 2
    assert AutoTokenizer.from_pretrained(merged).pad_token == "</s>"
    stage("reward_modeling", *words("again", model=base, peft_path=out, lora_dropout=None))
    found = capsys.readouterr().err
    assert f"reward model {out}: from an older version" in found
    assert "this run trains it at the end marker" in found
    stage("reward_modeling", *words("merged-again", model=merged))
    assert f"reward model {merged}: from an older version" in capsys.readouterr().err


def test_resuming_an_older_checkpoint_says_that_its_score_moves(stage, words, tiny_checkpoint, capsys):
    options = {"model": tiny_checkpoint("llama"), "template_name": "alpaca", "save_strategy": "steps", "save_steps": 1}
    out = stage("reward_modeling", *words(**options, max_steps=1))
    (checkpoint,) = out.glob("checkpoint-*")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["stagewise_scored_at"]
    path.write_text(json.dumps(config))
    mark_whole(checkpoint)
    capsys.readouterr()
    stage("reward_modeling", *words(**options, max_steps=2, resume_from_checkpoint=True))
    printed = capsys.readouterr().err
    assert f"reward model {checkpoint}: from an older version" in printed
    assert "this run trains it at the end marker" in printed


@pytest.mark.real
def test_the_real_model_is_scored_at_its_end_marker(stage, words, merge, smollm):
    """Its pad token is its end marker."""
    limits = {"max_target_length": 64, "lora_dropout": 0}
    out, merged = check_scores_outside(stage, words, merge, model=smollm, learning_rate=1e-3, **limits)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    talk = chat_columns(6, 7)[0]
    ids = tokenizer.apply_chat_template(talk["prompt"] + talk["chosen"], return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    with torch.no_grad():
        score = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
    assert score == pytest.approx(evaluation_rows(out, 2)["b.jsonl:1"][0], abs=1e-5)
