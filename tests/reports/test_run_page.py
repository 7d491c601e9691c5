"""report.html: one file, of every stage and every end of a run, in which nothing runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser

import pytest

from stagewise.artifacts.manifest import effective_words
from stagewise.reports.run_page import page_of
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.launching import ROOT, environment, python, run, torchrun
from tests.pair_runs import flags_of

SCRIPT = "<script>alert('&')</script>"
HISTORY = [
    {"step": 0, "eval_loss": 3.0, "eval_loss_standard_error": 0.25, "eval_runtime": 2.0},
    {"step": 2, "loss": 2.5, "tokens_per_second": 100.0, "memory_gib": 1.5},
    {"step": 4, "loss": 1.5, "tokens_per_second": 300.0, "memory_gib": 1.5},
    {"step": 4, "eval_loss": 2.0, "eval_runtime": 2.0},
]


class Reader(HTMLParser):
    """What a browser makes of a page: its elements, their attributes and its text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def manifest(**changes):
    found = {
        "stage": "sft",
        "status": "finished",
        "command": ["supervised_finetuning.py", "--output_dir", "out dir"],
        "flags": {"output_dir": "out dir", "learning_rate": 0.01},
        "base_model": "base",
        "lineage": [
            {"stage": "pt", "base_model": "first/model", "from_hub": True, "steps": 7},
            {"stage": "merge", "base_model": "first/model", "adapter": "outputs/pt"},
            {"stage": "sft", "base_model": "base"},
        ],
        "data": {
            "train": {"read": 12, "kept": 9, "cut": 1, "left_out": {"no answer": 2, "broken JSON": 1}, "files": ["a"]}
        },
        "parameters": {"all": 200, "trained": 50},
        "versions": {"torch": "9.9"},
        "began": "2026-11-22 01:02:03",
        "seconds": 75.2,
        "peak_memory_gib": 2.25,
        "steps": 4,
    }
    return {**found, **changes}


def samples(step, text):
    texts = [{"label": "answer", "text": text, "score": None, "ended": True}]
    texts.append({"label": "reference", "text": "as it stands there", "score": None, "ended": True})
    return step, [{"where": "v.jsonl:3", "prompt": "why", "texts": texts}]


def test_it_says_what_ran_on_what_and_to_what_end():
    page = Reader(
        page_of(
            "mine", manifest(), HISTORY, [samples(0, "said once"), samples(2, "said twice"), samples(4, "said thrice")]
        )
    )
    for words in (
        "mine: supervised finetuning",
        "finished",
        "3 → 2",  # the validation loss
        "3 ± 0.25",
        "1 min 15 s",
        "2.2 GiB",
        "2 no answer, 1 broken JSON",
        "50 of 200 parameters (25.00%)",
        "--learning_rate",
        "python supervised_finetuning.py \\\n    --output_dir 'out dir'",
        "9.9",
        "answer at step 0",
        "answer at step 4",
        "as it stands there",
    ):
        assert words in page.text, words
    places = [page.text.index(words) for words in ("first/model", "continued pretraining", "adapter merged")]
    assert places == sorted(places), "the lineage begins with the first model"
    # of three evaluations the one between is folded away, and what the record says stands there once
    order = ("said once", "answers in between", "said twice", "said thrice", "as it stands there")
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    assert page.text.count("as it stands there") == 1


def test_the_command_is_the_one_that_took_effect():
    typed = ["supervised_finetuning.py", "--max_steps", "100", "--evaluation_strategy", "no", "--max_steps", "8"]
    given = ["--max_steps", "100", "--eval_strategy", "no", "--max_steps", "8"]
    effective, replaced = effective_words(given)
    assert effective == ["--eval_strategy", "no", "--max_steps", "8"] and replaced == {"max_steps": ["100"]}
    changed = manifest(
        command=typed,
        effective=effective,
        replaced=replaced,
        settled={"torch_dtype": "float16"},
        flags={"max_steps": 8, "eval_strategy": "no", "torch_dtype": "bfloat16"},
    )
    found = Reader(page_of("mine", changed, HISTORY, [])).text
    assert "python supervised_finetuning.py \\\n    --eval_strategy no \\\n    --max_steps 8" in found
    assert found.count("--max_steps 100") == 1 and found.index("As it was typed") < found.index("--max_steps 100")
    assert "replaces 100" in found and "given as float16" in found
    one = Reader(page_of("mine", manifest(effective=["--output_dir", "out dir"]), HISTORY, [])).text
    assert "As it was typed" not in one and "replaces" not in one


@pytest.mark.parametrize(
    ("processes", "nodes", "start"),
    [(1, 1, "python s.py"), (2, 1, "torchrun --nproc_per_node 2 s.py"),
     (16, 2, "torchrun --nnodes 2 --nproc_per_node 8 s.py")],
)  # fmt: skip
def test_the_command_starts_as_many_processes(processes, nodes, start):
    found = page_of("mine", manifest(command=["s.py"], processes=processes, nodes=nodes), HISTORY, [])
    assert f"<pre>{start}</pre>" in found


@pytest.mark.parametrize(
    ("words", "effective", "replaced"),
    [
        ([], [], {}),
        (["--a", "1", "2", "--b", "--a", "3"], ["--b", "--a", "3"], {"a": ["1 2"]}),
        (["--b", "--b", "False", "--b"], ["--b"], {"b": ["True", "False"]}),
        (["--hub_token", "secret", "--hub_token", "other"], ["--hub_token", "…"], {}),
        (["--rate", "-1"], ["--rate", "-1"], {}),
    ],
)
def test_of_a_flag_the_last_one_counts(words, effective, replaced):
    assert effective_words(words) == (effective, replaced)


def test_blocks_of_one_text_are_kept_apart():
    blocks = [{"where": "a.txt", "prompt": p, "texts": [{"label": "answer", "text": f"after {p}"}]} for p in "xy"]
    page = Reader(page_of("mine", manifest(), HISTORY, [(0, blocks)]))
    assert page.text.count("after x") == page.text.count("after y") == 1


def test_nothing_in_it_runs_and_nothing_is_fetched():
    evil = manifest(
        error=SCRIPT,
        status=SCRIPT,
        command=[SCRIPT],
        flags={SCRIPT: SCRIPT},
        base_model=SCRIPT,
        lineage=[{"stage": SCRIPT, "base_model": SCRIPT, "reward_model": {"path": SCRIPT, "lineage": []}}],
        data={
            "train": {"read": 1, "kept": 0, "left_out": {SCRIPT: 1}, "files": [SCRIPT], "sources": [{SCRIPT: SCRIPT}]}
        },
        versions={SCRIPT: SCRIPT},
        began=SCRIPT,
        template=SCRIPT,
    )
    history = [{"step": 1, f"eval_{SCRIPT}": SCRIPT}, *HISTORY]
    shown = [{"where": SCRIPT, "prompt": SCRIPT, "texts": [{"label": SCRIPT, "text": SCRIPT}]}]
    page = Reader(page_of(SCRIPT, evil, history, [(1, shown)]))
    assert "script" not in page.tags and page.text.count(SCRIPT) >= 15
    assert {tag for tag in page.tags if tag in ("img", "link", "iframe", "object", "embed", "form", "base")} == set()
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "style")]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_it_is_readable_in_light_and_dark():
    """Text and lines of both palettes against their backgrounds (WCAG: 4.5 for text, 3 for lines)."""
    style = page_of("x", manifest(), HISTORY, [])
    palettes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(palettes) == 2 and "prefers-color-scheme: dark" in style

    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        high, low = sorted((light(one), light(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for palette in palettes:
        for ground in ("paper", "card"):
            for name, least in (("ink", 7), ("soft", 4.5), ("good", 4.5), ("bad", 4.5), ("wait", 4.5)):
                assert contrast(palette[name], palette[ground]) >= least, (name, ground, palette)
            for line in range(4):
                assert contrast(palette[f"line{line}"], palette[ground]) >= 3, (line, ground, palette)


def test_a_run_that_has_logged_nothing_has_a_page():
    page = Reader(page_of("x", {"stage": "sft", "status": "running"}, [], []))
    assert "had not ended" in page.text and "Nothing was logged" in page.text


# --- every stage, every end ------------------------------------------------------------------------------------------


def page(folder):
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


def flags(tmp_path, model, out="out", **changes):
    found = {
        "model_name_or_path": model,
        "train_file_dir": "data/finetune/train",
        "validation_file_dir": "data/finetune/validation",
        "max_train_samples": 8,
        "max_eval_samples": 4,
        "model_max_length": 512,
        "output_dir": tmp_path / out,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        **changes,
    }
    return [word for name, value in found.items() if value is not None for word in (f"--{name}", value)]


def words_of(script, tmp_path, model, score_model):
    pairs = flags_of(tmp_path, model, logging_steps=1)
    text = {"train_file_dir": "data/pretrain/train", "validation_file_dir": "data/pretrain/validation"}
    ppo = {"reward_model_name_or_path": score_model, "rollouts": 1, "batch_size": 4, "max_steps": None}
    ppo |= {"model_max_length": None, "max_source_length": 400, "max_target_length": 8}
    return {
        "pretraining": flags(tmp_path, model, block_size=128, model_max_length=None, **text),
        "supervised_finetuning": flags(tmp_path, model),
        "reward_modeling": pairs,
        "dpo_training": pairs,
        "ppo_training": flags(tmp_path, model, **ppo),
    }[script]


TITLES = {
    "pretraining": "loss",
    "supervised_finetuning": "perplexity",
    "reward_modeling": "margin: chosen less rejected",
    "dpo_training": "rewards",
    "ppo_training": "KL to the reference, nats per response",
}


@pytest.mark.parametrize("script", TITLES)
def test_every_stage_has_its_page_and_curves(stage, tiny_checkpoint, tmp_path, script):
    words = words_of(script, tmp_path, tiny_checkpoint("llama"), tiny_checkpoint("llama", task="score"))
    out = stage(script, *words, "--eval_on_start")
    found = page(out)
    assert "replaces" not in found.text and "given as" not in found.text
    assert "finished" in found.text and TITLES[script] in found.text and "tokens per second" in found.text
    assert found.tags.count("svg") >= 4
    (first, *_) = [json.loads(x) for x in sorted((out / "eval_samples").glob("*"))[-1].read_text().splitlines()]
    assert first["where"] in found.text and first["prompt"].strip() in found.text
    assert (out / "loss.png").is_file()
    assert (out / "curves.png").is_file() == (script not in ("pretraining", "supervised_finetuning"))
    step = json.loads((out / "run.json").read_text())["lineage"][-1]
    assert step["data"]["train"]["kept"] and step["metrics"]["eval"] and step["output_dir"] == str(out)


def test_what_replaces_what_is_told_from_a_file_and_a_command_line(stage, tiny_checkpoint, tmp_path):
    words = flags(tmp_path, tiny_checkpoint("llama"))
    file = tmp_path / "flags.yaml"
    file.write_text("max_steps: 77\nbf16: true\n")
    out = stage("supervised_finetuning", file, *words, "--torch_dtype", "float16", "--evaluation_strategy", "no")
    found = page(out).text
    told = json.loads((out / "run.json").read_text())
    assert told["replaced"] == {"max_steps": ["77"]} and told["settled"] == {"torch_dtype": "float16"}
    assert told["flags"]["torch_dtype"] == "bfloat16"
    assert "replaces 77" in found and "given as float16" in found
    command = found[found.index("python supervised_finetuning.py") :].split("As it was typed")[0]
    assert "--bf16" in command and "--eval_strategy no" in command and "77" not in command
    assert "evaluation_strategy" not in command and str(file) not in command


def test_a_run_that_fails_leaves_its_page(stage, tiny_checkpoint, tmp_path, monkeypatch):
    import supervised_finetuning

    class Trainer(supervised_finetuning.SFTTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise RuntimeError("the disk is full: <b>")
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(supervised_finetuning, "SFTTrainer", Trainer)
    words = flags(tmp_path, tiny_checkpoint("llama"), max_steps=6)
    with pytest.raises(RuntimeError, match="the disk is full"):
        stage("supervised_finetuning", *words, "--eval_on_start")
    found = page(tmp_path / "out")
    assert "failed" in found.text and "RuntimeError: the disk is full: <b>" in found.text and "b" not in found.open
    assert found.tags.count("svg") >= 3, "the curves up to there"
    assert (tmp_path / "out" / "loss.png").is_file()


def test_what_is_only_looked_at_does_not_end_a_run(stage, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("stagewise.training.run.write_page", full)
    monkeypatch.setattr("stagewise.training.sample_generations.greedy_answers", full)
    out = stage("supervised_finetuning", *flags(tmp_path, tiny_checkpoint("llama")))
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert (out / "adapter_model.safetensors").is_file()
    said = capsys.readouterr().err
    assert "report.html and the pictures were not written: OSError: no space left on device" in said
    assert "--eval_samples: none at step 2: OSError: no space left on device" in said


def test_samples_of_an_earlier_run_are_not_shown(stage, tiny_checkpoint, tmp_path):
    (tmp_path / "out" / "eval_samples").mkdir(parents=True)
    left = {"where": "v.jsonl:1", "prompt": "p", "texts": [{"label": "answer", "text": "of a run that failed"}]}
    (tmp_path / "out" / "eval_samples" / "step-7.jsonl").write_text(json.dumps(left) + "\n")
    out = stage(
        "supervised_finetuning", *flags(tmp_path, tiny_checkpoint("llama"), eval_strategy="steps", eval_steps=1)
    )
    found = page(out).text
    assert "answer at step 2" in found and "of a run that failed" not in found
    assert "IntervalStrategy" not in found, "a flag as it is given"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "eval_runtime" in log] == [1, 2], (
        "the last step's counts at the end, too"
    )
    last = json.loads((out / "eval_results.json").read_text())
    assert (
        last["eval_loss"] == history[-2]["eval_loss"]
        and last == json.loads((out / "run.json").read_text())["metrics"]["eval"]
    )


def test_a_run_that_fails_before_it_trained_writes_over_nothing(stage, tiny_checkpoint, tmp_path):
    out = stage("supervised_finetuning", *flags(tmp_path, tiny_checkpoint("llama")))
    before = (out / "report.html").read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text("{broken\n")
    words = flags(tmp_path, tiny_checkpoint("llama"), train_file_dir=tmp_path / "bad")
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words, "--overwrite_output_dir")
    assert (out / "report.html").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_a_page(tmp_path, number):
    for name in ("base",):
        build_tiny_model("llama").save_pretrained(tmp_path / name)
        build_tiny_tokenizer().save_pretrained(tmp_path / name)
    words = flags(tmp_path, tmp_path / "base", max_steps=5000, save_steps=2)
    process = subprocess.Popen(
        python("supervised_finetuning", *words), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if re.search(r"step 4/5000 .*loss", line):
                break
        os.kill(process.pid, number)
        process.stderr.read()
        code = process.wait(timeout=120)
    finally:
        process.kill()
    found = page(tmp_path / "out")
    if number == signal.SIGTERM:
        assert code == 143 and "stopped by a signal" in found.text
        assert (tmp_path / "out" / "loss.png").is_file()
    else:
        assert code == -signal.SIGKILL and "had not ended" in found.text
    assert found.tags.count("svg") >= 3


def test_a_resumed_run_shows_what_was_before(stage, tiny_checkpoint, tmp_path):
    words = flags(tmp_path, tiny_checkpoint("llama"), save_steps=1)
    whole = stage("supervised_finetuning", *words)
    for path in whole.iterdir():
        if path.name not in ("checkpoint-1", "eval_samples"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage("supervised_finetuning", *words, "--resume_from_checkpoint", "True")
    found = page(whole)
    assert "time since it was resumed" in found.text
    assert "checkpoint-1" in found.text and "training, step 1:" in found.text.replace("\n", " ")


@pytest.mark.distributed
def test_two_processes_write_it_once(tmp_path):
    build_tiny_model("llama").save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = flags(tmp_path, tmp_path / "base", report_to="tensorboard", per_device_train_batch_size=1)
    began = time.time()
    written = run(torchrun("supervised_finetuning", *words, "--eval_on_start"))
    out = tmp_path / "out"
    found = page(out)
    assert re.search(r"processes\n2\n", found.text) and "finished" in found.text
    assert len(list((out / "logs").glob("events*"))) == 1
    assert [path.name for path in sorted((out / "eval_samples").iterdir())] == ["step-0.jsonl", "step-2.jsonl"]
    assert written.count("to look at:") == 1 and len(re.findall(r"step 2/2 .*?loss ", written)) >= 1
    assert (out / "report.html").stat().st_mtime >= began and not list(out.glob("*.tmp"))
    assert len((out / "eval_samples" / "step-2.jsonl").read_text(encoding="utf-8").splitlines()) == 3
