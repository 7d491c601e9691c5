"""tools.show_data on a tokenizer that gives every byte one token, so that each number can be counted by hand."""

import json
import os
import re
import shlex

import pytest
import yaml
from peft import PromptTuningConfig, get_peft_model

from tests.conftest import build_tiny_model, tiny_config
from tools import show_data

CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{{ '\n' }}"
    "{% elif m.role == 'assistant' %}A:{{ m.content }}</s>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
BAR = "█" * 40
# U:hi⏎ 5, A: 2, yes</s> 4 learned, ⏎ 1: 12 tokens; so 20 with 9 learned; two exchanges of 9 with 2 learned each: 18.
TURNS = [["hi", "yes"], ["hello", "good day"], ["a", "b", "c", "d"]]


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *letters]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT
    return wrapped


def conversation(*turns):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.parent


@pytest.fixture
def model(tmp_path):
    """Factory: a directory with a config and a tokenizer, and no weights."""

    def make(family="llama"):
        folder = tmp_path / f"model-{family}"
        tiny_config(family).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data" / "a.jsonl", [conversation(*turns) for turns in TURNS])


@pytest.fixture
def show(capsys, monkeypatch):
    """Runs the tool: show("sft", "--train_file_dir", folder); returns what it prints."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(*words) -> str:
        capsys.readouterr()
        show_data.main([str(word) for word in words])
        return capsys.readouterr().out

    return run


def test_the_whole_report(show, model, data):
    folder = model()
    found = show(
        "supervised_finetuning.py",
        *("--model_name_or_path", folder, "--train_file_dir", data, "--model_max_length", 32),
        *("--per_device_train_batch_size", 2, "--samples", 2),
    )
    assert (
        found
        == f"""\
supervised_finetuning.py with {folder}, chat template: the tokenizer's own

── train ──
{data}/a.jsonl
3 records read, 3 kept, 0 left out, 0 cut
3 records, 50 tokens, 17 with labels (34%)
tokens of a record: 12 at least, median 18, 90% have at most 20, 99% at most 20, the longest 20

tokens  records
    12        1  {BAR}
    13        0
    14        0
    15        0
    16        0
    17        0
    18        1  {BAR}
    19        0
    20        1  {BAR}

── a step ──
--per_device_train_batch_size 2 × --gradient_accumulation_steps 1 × 1 process
rows are packed: llama is a tested family
a step: 2 packed rows, 78.1% full, with 3.0 examples; 50 tokens, 17 with labels, and no padding; \
1 step per epoch, 3 in all

── samples of train: labels are between « and » ──

1 of 2: a.jsonl:1, 12 tokens, 4 with labels (33.3%)

U:hi
A:«yes</s>»


2 of 2: a.jsonl:3, 18 tokens, 4 with labels (22.2%)

U:a
A:«b</s>»
U:c
A:«d</s>»


"""
    )


def test_padded_rows_are_counted_with_their_padding(show, model, data):
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--packing", "False", "--samples", 0)
    found = show("sft", *words, "--per_device_train_batch_size", 3)
    assert "rows are padded: --packing False" in found
    assert "a step: 3 records; 50 tokens, 17 with labels, and 10 of padding (16.7%); 1 step per epoch" in found
    assert "samples" not in found


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--shift_attn",), "--shift_attn cuts a row into groups, which belong to one document"),
        (("--fine_tuning_type", "p_tuning"), "p_tuning: the virtual tokens stand before a row, not before each of"),
    ],
)
def test_rows_that_a_method_keeps_apart_are_called_padded(flags, why, show, model, data):
    found = show("sft", "--model_name_or_path", model(), "--train_file_dir", data, "--samples", 0, *flags)
    assert f"rows are padded: {why}" in found


def test_the_method_of_an_adapter_to_go_on_from_counts(show, model, data, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(build_tiny_model("llama"), config).save_pretrained(tmp_path / "adapter")
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--samples", 0)
    assert "rows are padded: prompt_tuning: the virtual" in show("sft", *words, "--peft_path", tmp_path / "adapter")


def test_flags_that_the_stage_would_refuse_are_refused(show, model, data, capsys):
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--shift_attn", "--fine_tuning_type")
    with pytest.raises(SystemExit) as stop:
        show("sft", *words, "p_tuning")
    assert stop.value.code == 2
    assert "--shift_attn: not with p_tuning" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        show("sft", *words, "full", "--use-peft")
    assert "--use_peft True trains an adapter, --fine_tuning_type full" in capsys.readouterr().err


def test_a_family_that_only_a_probe_can_tell_is_shown_both_ways(show, model, data):
    found = show("sft", "--model_name_or_path", model("bloom"), "--train_file_dir", data, "--samples", 0)
    assert "bloom is not a tested family: a probe of its weights" in found
    assert "if packed, a step: 1 packed row," in found and "if padded, a step: 3 records;" in found


def test_what_is_cut_and_left_out_is_said(show, model, data):
    write(data / "b.jsonl", [conversation("x" * 30, "y"), {"messages": []}, {"text": "no conversation"}])
    found = show(
        *("sft", "--model_name_or_path", model(), "--train_file_dir", data, "--model_max_length", 12, "--samples", 0),
        *("--on_bad_record", "skip", "--validation_file_dir", data / "a.jsonl"),
    )
    train = found[found.index("── train") : found.index("── validation")]
    # The first fits; the second is cut; the third loses an exchange; the question of 30 letters fills the limit.
    assert "6 records read, 3 kept, 3 left out, 2 cut" in train
    assert "left out: 1 no room for an answer" in train
    assert "66.7% of the records (2) are cut at --model_max_length 12" in train
    left_out = found[found.index("── left out: 3 of 3 ──") :].splitlines()
    assert [line.split(": ")[0] for line in left_out[1:4]] == ["b.jsonl:2", "b.jsonl:3", "b.jsonl:1"]


def test_a_bad_record_ends_it_as_it_ends_the_stage(show, model, data, capsys):
    write(data / "b.jsonl", [{"messages": [{"role": "user", "content": ""}]}])
    with pytest.raises(SystemExit) as stop:
        show("sft", "--model_name_or_path", model(), "--train_file_dir", data)
    assert stop.value.code == 1
    assert "error: b.jsonl:1: " in capsys.readouterr().err


def test_a_flag_that_the_stage_does_not_have_ends_it(show, model, data, capsys):
    with pytest.raises(SystemExit) as stop:
        show("sft", "--model_name_or_path", model(), "--train_file_dir", data, "--block_size", 4)
    assert stop.value.code == 2
    assert "--block_size: no such flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("nosuch",),
        ("sft", "--samples", "-1"),
        ("sft", "--processes", "0"),
        (),
        ("sft", "--figure", "data.bmp"),
        ("sft", "--figure", "no/such/data.png"),
    ],
)
def test_its_own_words_are_checked(show, words, capsys):
    with pytest.raises(SystemExit) as stop:
        show(*words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_nothing_is_written_to_the_output_directory(show, model, data, tmp_path):
    finished = tmp_path / "out"
    finished.mkdir()
    (finished / "run.json").write_text('{"status": "finished"}')
    (finished / "rejected.jsonl").write_text("of the run before\n")
    write(data / "b.jsonl", [{"messages": []}])
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--on_bad_record", "skip", "--samples", 0)
    assert "1 left out" in show("sft", *words, "--output_dir", finished)
    assert (finished / "rejected.jsonl").read_text() == "of the run before\n"
    assert sorted(path.name for path in finished.iterdir()) == ["rejected.jsonl", "run.json"]
    show("sft", *words, "--output_dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_flags_of_devices_are_taken_and_left_aside(show, model, data):
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--samples", 0)
    with_them = show("sft", *words, "--fp16", "--deepspeed", "zero3.json", "--use_liger_kernel", "True")
    assert with_them == show("sft", *words)
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_processes_make_a_step_larger(show, model, data):
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--samples", 0, "--packing", "False")
    found = show("sft", *words, "--per_device_train_batch_size", 1, "--processes", 3)
    assert "--per_device_train_batch_size 1 × --gradient_accumulation_steps 1 × 3 processes" in found
    assert "a step: 3 records; 50 tokens, 17 with labels, and no padding; 1 step per epoch, 3 in all" in found


def test_a_file_of_flags_is_read(show, model, data, tmp_path):
    flags = {
        "model_name_or_path": str(model()),
        "train_file_dir": str(data),
        "output_dir": "outputs/sft",
        "bf16": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(flags))
    found = show("sft", tmp_path / "run.yaml", "--samples", 1, "--max_train_samples", 1)
    assert "1 record, 12 tokens, 4 with labels (33.3%)" in found and "1 of 1: a.jsonl:1" in found


def test_a_stream_is_stood_for_by_its_first_records(show, model, data, monkeypatch, capsys):
    words = (
        "--model_name_or_path",
        model(),
        "--train_file_dir",
        data,
        "--model_max_length",
        32,
        "--streaming",
        "True",
    )
    with pytest.raises(SystemExit):
        show("sft", *words)
    assert "--max_steps: missing" in capsys.readouterr().err
    words += ("--max_steps", 7, "--per_device_train_batch_size", 1)
    found = show("sft", *words)
    assert "--streaming: these are the first records, and stand for all" in found
    assert "3 records, 50 tokens, 17 with labels" in found and "3 of 3: a.jsonl:3" in found
    assert "a step: 1 packed row, 78.1% full, with 1.5 examples; 25 tokens" in found
    assert "and no padding; 7 in all" in found and "per epoch" not in found
    monkeypatch.setattr(show_data, "STREAMED", 2)
    assert "2 records, 32 tokens, 13 with labels" in show("sft", *words)
    assert "1 record, 12 tokens" in show("sft", *words, "--max_train_samples", 1)


def test_what_is_wrong_in_a_stream_is_said(show, model, data):
    write(data / "b.jsonl", [{"messages": []}, conversation("hi", "yes")])
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--streaming", "True", "--max_steps", 7)
    found = show("sft", *words, "--on_bad_record", "skip", "--samples", 0, "--validation_file_dir", data / "a.jsonl")
    assert "5 records read, 4 kept, 1 left out, 0 cut" in found
    assert "── left out: 1 of 1 ──\nb.jsonl:1: " in found
    assert found.index("── train ──") < found.index("── validation ──")


def test_two_weighted_sources_of_a_stream_are_both_shown(show, model, data, tmp_path):
    other = write(tmp_path / "other" / "b.jsonl", [conversation("hi", "yes")] * 50)
    words = ("--model_name_or_path", model(), "--train_file_dir", f"{other},{data}", "--data_weights", "0.5,0.5")
    found = show("sft", *words, "--streaming", "True", "--max_steps", 7, "--samples", 0)
    read = int(re.search(r"(\d+) records read", found)[1])
    assert 4 <= read < 50  # until the three of the second source are at their end


def test_texts(show, model, tmp_path):
    # abcdefg and the end token: 8 tokens in blocks of 5, the second of which begins with the last token of the first.
    folder = write(tmp_path / "texts" / "a.jsonl", [{"text": "abcdefg"}])
    found = show("pretraining.py", "--model_name_or_path", model(), "--train_file_dir", folder, "--block_size", 5)
    assert "1 record in 2 blocks, 9 tokens, 7 with labels (77.8%)" in found
    assert "1 of 2: a.jsonl:1, 5 tokens, 4 with labels (80%)\n\n«abcde»\n" in found
    assert "2 of 2: a.jsonl:1, 4 tokens, 3 with labels (75%)\n\n«efg</s>»\n" in found


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_pairs(show, model, tmp_path, stage):
    # U:hi⏎A: is 7 tokens; yes</s> 4, no</s> 3.
    pair = {**conversation("hi"), "chosen": "yes", "rejected": "no"}
    folder = write(tmp_path / "pairs" / "a.jsonl", [pair])
    found = show(stage, "--model_name_or_path", model(), "--train_file_dir", folder)
    assert "1 pair, 21 tokens in both rows, 7 of them the answers' (33.3%)" in found
    assert "a step: 1 pair in 2 rows; 21 tokens, 7 of them the answers', and 1 of padding (4.5%)" in found
    assert "1 of 1: a.jsonl:1, chosen, 11 tokens, 4 with labels (36.4%)\n\nU:hi\nA:«yes</s>»\n" in found
    assert "1 of 1: a.jsonl:1, rejected, 10 tokens, 3 with labels (30%)\n\nU:hi\nA:«no</s>»\n" in found


def test_prompts(show, model, data):
    # The prompts end with A: and are 7, 10 and 4 + 2 + 3 + 4 + 2 = 15 tokens long (b</s>⏎ is 3).
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--reward_model_name_or_path", "another")
    found = show("ppo", *words, "--batch_size", 3, "--max_target_length", 9, "--samples", 1)
    assert "3 prompts, 32 tokens; the answers are still to come" in found
    assert "a rollout: 3 prompts; 32 tokens, and 13 of padding (28.9%); 1 rollout per epoch, 3 in all" in found
    assert "each is used in 4 updates; its answers may have up to 9 tokens each" in found
    assert "1 of 1: a.jsonl:1, 7 tokens\n\nU:hi\nA:\n" in found
    # The third loses its first exchange: U:c⏎A: is 6.
    found = show("ppo", *words, "--max_source_length", 10, "--samples", 0)
    assert "3 records read, 3 kept, 0 left out, 1 cut" in found and "3 prompts, 23 tokens" in found
    assert "33.3% of the prompts (1) are cut at --max_source_length 10" in found


def test_a_picture_is_written_where_it_is_asked_for(show, model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model_name_or_path", model(), "--train_file_dir", data, "--samples", 0)
    before = set(tmp_path.iterdir())
    assert "data.png" not in show("sft", *words)
    assert set(tmp_path.iterdir()) == before
    assert show("sft", *words, "--figure", "data.png").endswith(
        "data.png: lengths and shares of labels, as a picture\n"
    )
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_learned_tokens_are_green_on_a_terminal(show, model, data, monkeypatch):
    words = ("sft", "--model_name_or_path", model(), "--train_file_dir", data, "--samples", 1)
    monkeypatch.setattr(show_data, "has_color", lambda stream: True)
    found = show(*words)
    assert "\033[90mU:hi\nA:\033[0m\033[32myes</s>\033[0m" in found
    assert "labels are green" in found and "«" not in found


def test_samples_are_taken_from_all_over():
    from tools.data_report import chosen_samples

    assert chosen_samples(range(101), 5) == [0, 25, 50, 75, 100]
    assert chosen_samples(range(3), 10) == [0, 1, 2]
    assert chosen_samples(range(3), 1) == [0] and chosen_samples(range(3), 0) == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["docs/show_data.md", "docs/show_data_zh.md"])
def test_the_page_shows_what_is_printed(show, smollm, monkeypatch, name):
    monkeypatch.chdir(smollm.parent.parent)
    with open(name, encoding="utf-8") as page:
        command, report = re.findall(r"^```(?:bash|text)\n(.*?)^```$", page.read(), re.MULTILINE | re.DOTALL)[:2]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "tools.show_data"]
    assert show(*words[3:]).rstrip() == report.rstrip()


# --- the stages ---

PAIR = {**conversation("hi"), "chosen": "yes", "rejected": "no"}
RUNS = {
    "pt": ("pretraining", [{"text": "abcdefg"}] * 5, ("--block_size", 6)),
    "sft": ("supervised_finetuning", [conversation(*turns) for turns in TURNS], ("--model_max_length", 32)),
    "rm": ("reward_modeling", [PAIR, {**PAIR, "chosen": "yes indeed"}, {**PAIR, "chosen": "well"}], ()),
    "dpo": ("dpo_training", [PAIR, {**PAIR, "chosen": "yes indeed"}, {**PAIR, "chosen": "well"}], ()),
    "ppo": ("ppo_training", [conversation(*turns) for turns in TURNS], ("--max_target_length", 4, "--batch_size", 2)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_says_the_same_before_it_trains(stage, show, tiny_checkpoint, tmp_path, name):
    script, records, own = RUNS[name]
    folder = write(tmp_path / "train" / "a.jsonl", records)
    model = tiny_checkpoint("llama", tokenizer=byte_tokenizer())
    words = ["--model_name_or_path", model, "--train_file_dir", folder, "--validation_file_dir", folder, *own]
    words += ["--per_device_train_batch_size", 2, "--num_train_epochs", 2, "--output_dir", tmp_path / "out"]
    if name == "ppo":
        reward = tiny_checkpoint("llama", task="score", tokenizer=byte_tokenizer())
        words += ["--reward_model_name_or_path", reward]
    found = show(name, *words, "--samples", 0)
    out = stage(script, *words, "--report_to", "none")
    run = json.loads((out / "run.json").read_text())
    summary = run["data"]["summary"]
    assert summary["train"]["records"] == run["data"]["train"]["kept"] == len(records)
    assert summary["train"] == {**summary["validation"]}  # the same folder
    assert f"{summary['train']['tokens']} tokens" in found
    step = summary["step"]
    assert f"{step['tokens']:.0f} tokens" in found and f"{step['steps']} in all" in found
    # What was foretold is what happened: in PPO a rollout of two prompts has --ppo_epochs 4 updates.
    assert run["steps"] == step["steps"] * (4 if name == "ppo" else 1)


def test_a_stream_is_summed_up_by_its_first_records_before_it_trains(stage, tiny_checkpoint, data, tmp_path):
    model = tiny_checkpoint("llama", tokenizer=byte_tokenizer())
    words = ["--model_name_or_path", model, "--train_file_dir", data, "--model_max_length", 32, "--report_to", "none"]
    words += ["--streaming", "True", "--max_steps", 1, "--per_device_train_batch_size", 1]
    out = stage("supervised_finetuning", *words, "--output_dir", tmp_path / "out")
    summary = json.loads((out / "run.json").read_text())["data"]["summary"]
    assert summary["train"]["streamed"] is True
    assert (summary["train"]["records"], summary["train"]["tokens"], summary["train"]["learned"]) == (3, 50, 17)
    assert (summary["step"]["tokens"], summary["step"]["filled"]) == (25, 0.7812)  # 50 tokens in two rows of 32
    assert (summary["step"]["steps_per_epoch"], summary["step"]["steps"]) == (None, 1)


def test_a_stage_starts_from_the_cache_that_was_filled_here(show, stage, tiny_checkpoint, data, tmp_path, capsys):
    model = tiny_checkpoint("llama", tokenizer=byte_tokenizer())
    words = ["--model_name_or_path", model, "--train_file_dir", data, "--cache_dir", tmp_path / "cache"]
    found = show("sft", *words, "--samples", 1)
    stage("supervised_finetuning", *words, "--max_steps", 1, "--report_to", "none", "--output_dir", tmp_path / "out")
    assert f"read from {tmp_path / 'cache'}" in capsys.readouterr().err
    assert show("sft", *words, "--samples", 1) == found
