import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagewise.adapters.attach import attach_adapter, load_adapter
from stagewise.config.arguments import AdapterArguments
from tests.conftest import adapter_weights

QUESTIONS = ["fever", "rest", "water", "a cold", "sleep", "diet", "pain", "exercise"]


def write_records(path, count, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(start, start + count):
        topic = QUESTIONS[number % len(QUESTIONS)]
        turns = [
            {"from": "human", "value": f"what about {topic} {number}"},
            {"from": "gpt", "value": f"drink water and {topic}"},
        ]
        if number % 3 == 0:
            turns += [{"from": "human", "value": "and then"}, {"from": "gpt", "value": f"rest with {topic} again"}]
        records.append(json.dumps({"conversations": turns}))
    path.write_text("\n".join(records) + "\n")
    return path.parent


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    """Flags of a short run on a tiny llama; the list can be added to."""

    def make(family="llama", out="out", **changes):
        flags = {
            "model_name_or_path": tiny_checkpoint(family),
            "train_file_dir": write_records(tmp_path / "train" / "a.jsonl", 12),
            "validation_file_dir": write_records(tmp_path / "validation" / "b.jsonl", 5, start=40),
            "output_dir": tmp_path / out,
            "model_max_length": 400,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lora_dropout": 0,
            "report_to": "none",
            **changes,
        }
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    return make


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_leaves_what_the_contract_says(stage, words):
    out = stage("supervised_finetuning", *words(report_to="tensorboard"), "--eval_on_start", "--save_eval_records")
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "checkpoint-4",
        "train_results.json",
        "train_results.txt",
        "eval_results.json",
        "eval_results.txt",
        "trainer_state.json",
        "training_args.bin",
        "logs",
        "loss.png",
        "run.json",
        "eval_records",
    }
    assert list((out / "logs").glob("events.out.tfevents.*"))
    run = manifest(out)
    assert (run["stage"], run["status"], run["template"], run["steps"]) == ("sft", "finished", "vicuna", 4)
    assert run["data"]["train"]["read"] == run["data"]["train"]["kept"] == 12
    assert run["data"]["validation"]["kept"] == 5
    assert run["flags"]["max_steps"] == 4
    assert "disable_tqdm" not in run["flags"]
    assert run["rows"].startswith("packed")
    assert run["metrics"]["eval"]["eval_loss"] < run["metrics"]["eval_before"]["eval_loss"]
    rows = [json.loads(line) for line in (out / "eval_records" / "step-4.jsonl").read_text().splitlines()]
    assert sorted(row["where"] for row in rows) == [f"b.jsonl:{n}" for n in range(1, 6)]
    mean = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    assert run["metrics"]["eval"]["eval_loss"] == pytest.approx(mean, rel=1e-6)
    assert run["metrics"]["eval"]["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    end = AutoTokenizer.from_pretrained(out).eos_token_id
    assert end in torch.tensor(json.loads((out / "generation_config.json").read_text())["eos_token_id"]).reshape(-1)


def test_the_saved_adapter_is_the_trained_one(stage, words):
    flags = words()
    out = stage("supervised_finetuning", *flags)
    base = AutoModelForCausalLM.from_pretrained(flags[1])
    fresh = attach_adapter(AutoModelForCausalLM.from_pretrained(flags[1]), AdapterArguments(), "CAUSAL_LM").eval()
    trained = load_adapter(base, out).eval()
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert (trained(ids).logits - fresh(ids).logits).abs().max() > 1e-2
    last = adapter_weights(out / "checkpoint-4")
    assert all(torch.equal(value, last[name]) for name, value in adapter_weights(out).items())


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(stage, words, tmp_path):
    dropout = {"lora_dropout": 0.1, "max_steps": 6}
    whole = stage("supervised_finetuning", *words(out="whole", **dropout))
    parts = stage("supervised_finetuning", *words(out="parts", save_steps=3, **dropout))
    # what a kill while checkpoint-6 was written leaves: no mark, no finished run
    (parts / "checkpoint-6" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (parts / name).unlink()
    flags = words(out="parts", save_steps=3, **dropout)
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *flags)
    assert ended.value.code == 2
    stage("supervised_finetuning", *flags, "--resume_from_checkpoint", "True")
    expected = adapter_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in adapter_weights(parts).items())


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def loss_and_gradients(checkpoint, records):
    """The mean loss over all answer tokens of these records, and its gradients, in float64, each record alone.

    Written out from the vicuna form: "SYSTEM USER: q ASSISTANT: a</s>USER: …", labels on answers and end markers.
    """
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).double(),
        AutoTokenizer.from_pretrained(checkpoint),
    )

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    total, count = 0.0, 0
    for record in records:
        tokens, answered, context = [], [], VICUNA
        for turn in record["conversations"]:
            if turn["from"] == "human":
                context += f"USER: {turn['value']} ASSISTANT:"
                continue
            asked, answer = ids(context), [*ids(f" {turn['value']}"), 2]
            tokens, answered = tokens + asked + answer, answered + [False] * len(asked) + [True] * len(answer)
            context = ""
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        for position in range(1, len(tokens)):
            if answered[position]:
                total = total - torch.log_softmax(logits[position - 1], -1)[tokens[position]]
                count += 1
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_those_of_a_loop_in_float64(stage, words, tmp_path, tiny_checkpoint, packing):
    """One step of gradient descent over all records: the logged loss and norm, and each weight's change."""
    checkpoint = tiny_checkpoint("llama")
    records = [json.loads(line) for line in (write_records(tmp_path / "all" / "a.jsonl", 6) / "a.jsonl").open()]
    flags = {"train_file_dir": tmp_path / "all", "validation_file_dir": None, "max_steps": 1, "use_peft": False}
    flags |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    flags |= {"template_name": "vicuna", "packing": packing}
    # six records are three steps of backward; of packed rows there are as many as the length gives
    flags |= {"per_device_train_batch_size": 6} if packing else {"gradient_accumulation_steps": 3}
    out = stage("supervised_finetuning", *words(lora_dropout=None, **flags))
    loss, gradients = loss_and_gradients(checkpoint, records)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"][0]
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    assert log["loss"] == pytest.approx(loss, rel=1e-6)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    before, after = adapter_weights(checkpoint), adapter_weights(out)
    for name, gradient in gradients.items():
        if name in before:  # tied weights are saved once
            torch.testing.assert_close((before[name] - after[name]).double(), gradient, rtol=1e-4, atol=1e-6)


def test_rows_of_two_are_two_rows_accumulated(stage, words):
    one = stage("supervised_finetuning", *words(out="one", per_device_train_batch_size=2))
    flags = words(out="two", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    two = stage("supervised_finetuning", *flags)
    expected = adapter_weights(one)
    for name, value in adapter_weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_packed_and_padded_validation_agree(stage, words):
    losses = [
        manifest(
            stage("supervised_finetuning", *words(out=f"p{packing}", packing=packing, max_steps=1), "--eval_on_start")
        )["metrics"]["eval_before"]["eval_loss"]
        for packing in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ["bloom", "falcon", "qwen3_5"])
def test_families_that_leak_are_padded_and_it_is_said(stage, words, family):
    out = stage("supervised_finetuning", *words(family, max_steps=1))
    assert manifest(out)["rows"].startswith("padded")


def test_full_training_saves_a_model(stage, words):
    flags = words(use_peft=False, lora_dropout=None)
    out = stage("supervised_finetuning", *flags)
    before = adapter_weights(flags[1])
    after = adapter_weights(out)
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"


def test_a_finished_run_is_not_written_over(stage, words, capsys):
    out = stage("supervised_finetuning", *words(max_steps=1))
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *words(max_steps=2))
    assert ended.value.code == 2
    assert "holds a finished sft run; --overwrite_output_dir replaces it" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == before
    stage("supervised_finetuning", *words(max_steps=2), "--overwrite_output_dir")
    assert manifest(out)["steps"] == 2
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_bad_record_is_named_or_skipped_and_counted(stage, words, capsys):
    flags = words(max_steps=1)
    path = next(path for path in (flags[3]).iterdir())
    lines = path.read_text().splitlines()
    lines[4] = '{"conversations": [{"from": "alien", "value": "x"}, {"from": "gpt", "value": "y"}]}'
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *flags)
    assert ended.value.code == 1
    assert "a.jsonl:5" in capsys.readouterr().err
    out = stage("supervised_finetuning", *flags, "--on_bad_record", "skip")
    account = manifest(out)["data"]["train"]
    assert (account["read"], account["kept"], sum(account["left_out"].values())) == (12, 11, 1)
    assert json.loads((out / "rejected.jsonl").read_text())["where"] == "a.jsonl:5"
    # a run in its place leaves its own account there, no more and no less
    out = stage("supervised_finetuning", *flags, "--on_bad_record", "skip", "--overwrite_output_dir")
    assert json.loads((out / "rejected.jsonl").read_text())["where"] == "a.jsonl:5"


def test_a_base_whose_loss_is_nan_ends_the_run_without_a_step(stage, words, capsys):
    flags = words()
    from safetensors.torch import save_file

    weights = adapter_weights(flags[1])
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, flags[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *flags)
    assert ended.value.code == 1
    assert "of every step (4) is NaN or infinite: no step was taken" in capsys.readouterr().err
    out = flags[flags.index("--output_dir") + 1]
    assert manifest(out)["status"] == "failed"


def test_dry_run_writes_nothing(stage, words, tmp_path, capsys):
    out = stage("supervised_finetuning", *words(), "--dry_run")
    assert not out.exists()
    assert "dry run: 4 steps, about" in capsys.readouterr().err


def test_a_dry_run_on_a_cpu_scales_a_short_row_to_the_batch(stage, words, capsys, monkeypatch):
    sizes = []

    def measure(trainer, batch):
        sizes.append(tuple(batch["input_ids"].shape))
        assert "dry run: measures 256 tokens for a batch of 1 × " in capsys.readouterr().err or len(sizes) > 1
        return 2.0, 1000.0, 5000 * 2**30, 1000 * 2**30  # loss, seconds, bytes held before and grown by

    monkeypatch.setattr("stagewise.training.dry_run.measure", measure)
    stage("supervised_finetuning", *words(model_max_length=800, max_steps=6), "--dry_run")
    error = capsys.readouterr().err
    assert sizes == [(1, 256)] * 2, "once to warm up, once to measure"
    step = float(re.search(r"a step of the run takes about ([\d.]+) s", error)[1])
    minutes, gib = map(float, re.search(r"6 steps, about ([\d.]+) minutes and ([\d.]+) GiB", error).groups())
    times = (gib - 5000) / 1000  # the batch's tokens by the short row's
    assert times > 1.5
    assert 1000 * times < step < 1000 * times**2, "weights are linear in the row's length, attention is quadratic"
    assert minutes == pytest.approx(step * 6 / 60, abs=0.1)


def test_an_adapter_as_base_says_merge_first(stage, words, capsys):
    out = stage("supervised_finetuning", *words(max_steps=1))
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words(out="next", model_name_or_path=out))
    error = capsys.readouterr().err
    assert "merge_peft_adapter.py" in error and "--lora_model" in error


def test_the_same_folder_for_both_splits_is_said_aloud(stage, words, tmp_path, capsys):
    stage("supervised_finetuning", *words(max_steps=1, validation_file_dir=tmp_path / "train"))
    assert "--validation_file_dir is --train_file_dir" in capsys.readouterr().err


def test_a_share_of_the_training_records_can_be_held_out(stage, words):
    flags = words(max_steps=1, validation_file_dir=None, validation_split_percentage=25)
    run = manifest(stage("supervised_finetuning", *flags))
    assert run["data"]["train"]["kept"] == 9
    assert run["data"]["train"]["left_out"] == {"held out for validation": 3}
    assert run["data"]["validation"]["kept"] == 3


def test_noise_on_the_embeddings_changes_the_run(stage, words):
    plain = adapter_weights(stage("supervised_finetuning", *words(out="plain")))
    noisy = adapter_weights(stage("supervised_finetuning", *words(out="noisy", neft_alpha=5)))
    assert any(not torch.equal(value, noisy[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"validation_file_dir": None, "eval_strategy": "steps"},
            "evaluation is asked for without validation records",
        ),
        ({"train_file_dir": None}, "--train_file_dir: missing"),
        ({"train_file_dir": "nowhere"}, "nowhere"),
        ({"model_type": "bloom"}, "--model_type bloom: config.json"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"template_name": "nonsense"}, "--template_name: unknown template"),
    ],
)
def test_what_cannot_be_honoured_is_named(stage, words, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *words(**changes))
    assert ended.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_false_does_not_resume(stage, words, capsys):
    stage("supervised_finetuning", *words(max_steps=1))
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words(max_steps=2), "--resume_from_checkpoint", "False")
    assert "holds a finished sft run" in capsys.readouterr().err


def test_a_finished_run_without_checkpoints_is_not_begun_again_by_resuming(stage, words, capsys):
    stage("supervised_finetuning", *words(max_steps=1, save_strategy="no"))
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words(max_steps=2), "--resume_from_checkpoint", "True")
    assert "holds a finished sft run" in capsys.readouterr().err


def test_replacing_a_run_leaves_nothing_of_it_but_what_is_not_its_own(stage, words):
    out = stage("supervised_finetuning", *words(max_steps=1), "--save_eval_records")
    (out / "notes.txt").write_text("mine")
    full = words(max_steps=1, use_peft=False, lora_dropout=None)
    stage("supervised_finetuning", *full, "--overwrite_output_dir")
    names = {path.name for path in out.iterdir()}
    assert "config.json" in names and "notes.txt" in names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "eval_records"}


def test_an_access_token_is_not_written_down(stage, words):
    out = stage("supervised_finetuning", *words(max_steps=1), "--hf_hub_token", "hf_secret", "--learning-rate", "1e-3")
    text = (out / "run.json").read_text()
    assert "hf_secret" not in text
    assert manifest(out)["flags"]["learning_rate"] == 1e-3


def test_all_weights_are_trained_in_float32_unless_asked_otherwise(stage, words, tiny_checkpoint):
    base = tiny_checkpoint("llama", dtype=torch.bfloat16)
    changes = {"model_name_or_path": base, "use_peft": False, "lora_dropout": None, "max_steps": 1}
    dtypes = {
        asked: next(
            iter(
                adapter_weights(
                    stage("supervised_finetuning", *words(out=asked, torch_dtype=asked, **changes))
                ).values()
            )
        ).dtype
        for asked in ("auto", "bfloat16")
    }
    assert dtypes == {"auto": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--use_firefly_loss", "False"], "--use_firefly_loss False: .* give --mask_history"),
        (["--use_firefly_loss", "True", "--mask_history", "True"], "--use_firefly_loss trains on every turn"),
        (["--train_on_inputs", "True", "--mask_history", "True"], "--train_on_inputs trains on everything"),
        (["--use_firefly_loss", "True", "--train_on_inputs", "True"], "--train_on_inputs on questions, too"),
        (["--truncation_side", "middle"], "--truncation_side: expected right or left, found 'middle'"),
    ],
)
def test_flags_about_labels_that_cannot_be_followed(flags, says, stage, words, monkeypatch, capsys):
    """They end the run before weights are loaded."""
    monkeypatch.setattr("supervised_finetuning.load_causal_lm", None)
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words(), *flags)
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "turns", "limit"),
    [
        ([], [1, 2], 400),
        (["--use_firefly_loss", "True"], [1, 2], 400),
        (["--mask_history", "True"], [2], 400),
        ([], [1], 150),
        (["--truncation_side", "left"], [2], 150),
    ],
)
def test_flags_about_labels_reach_the_training_set(flags, turns, limit, stage, words, tmp_path, monkeypatch):
    exchanges = [("human", "what about rest"), ("gpt", "FIRST " * 8), ("human", "and then"), ("gpt", "SECOND " * 8)]
    record = {"conversations": [{"from": role, "value": text} for role, text in exchanges]}
    path = tmp_path / "two" / "a.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(record) + "\n")
    seen = []

    def stop(self, tokenizer, examples):
        ids = [[label for label in example.labels if label != -100] for example in examples]
        seen.extend(tokenizer.decode(each) for each in ids)
        raise SystemExit

    monkeypatch.setattr("stagewise.training.run.Run.show_sample", stop)
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words(train_file_dir=path.parent, model_max_length=limit), *flags)
    assert [turn for turn, word in ((1, "FIRST"), (2, "SECOND")) if word in seen[0]] == turns
