"""What the tests of reward modeling and DPO share: preference pairs, the flags of a short run, batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagewise.chat.preference_encoding import encode_preference
from stagewise.data.packing import PreferenceCollator
from stagewise.formats.parsers import parse_preference
from template import TEMPLATES
from tests.conftest import adapter_weights

# prompt turns (user first), chosen, rejected; the first prompt has a history
PAIRS = [
    (["hello", "hi there", "how do I treat a cold"], "rest and drink water", "ignore it"),
    (["what helps against a fever"], "drink", "take ten tablets at once and go for a run"),
    (["I sleep badly"], "keep one rising time, and no screens at night", "too bad"),
    (["is sugar bad"], "in large amounts it is", "never think about what you eat"),
    (["my knee hurts"], "rest it for some days; see a doctor if it swells", "run on it"),
    (["how much water a day"], "about two litres", "none"),
    (["can I stop my tablets"], "ask your doctor first", "yes, throw them all away today"),
    (["I feel sad"], "talk to a friend or a doctor; you are not alone", "so what"),
]


def records(first: int, last: int) -> list[dict]:
    roles = ("human", "gpt")
    return [
        {
            "conversations": [{"from": roles[n % 2], "value": turn} for n, turn in enumerate(turns)],
            "chosen": chosen,
            "rejected": rejected,
        }
        for turns, chosen, rejected in PAIRS[first:last]
    ]


def preferences(tokenizer, first=0, last=None):
    """The pairs as PreferenceExamples in the vicuna form."""
    parsed = [parse_preference(record, f"pairs:{n}") for n, record in enumerate(records(first, last), first)]
    return [encode_preference(tokenizer, TEMPLATES["vicuna"], preference, 400, 400)[0] for preference in parsed]


def batch_of(tokenizer, first=0, last=None):
    return PreferenceCollator(tokenizer.pad_token_id)(preferences(tokenizer, first, last))


def chat_columns(first=0, last=None) -> list[dict]:
    """The same pairs as TRL takes them: it renders and tokenizes them itself, by the tokenizer's chat template."""
    roles = ("user", "assistant")
    return [
        {
            "prompt": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for turns, chosen, rejected in PAIRS[first:last]
    ]


def write_records(path, first, last):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records(first, last)))
    return path.parent


def flags_of(folder, model, out="out", **changes) -> list:
    """Words of a short run: six training pairs in batches of two, two validation pairs."""
    flags = {
        "model_name_or_path": model,
        "train_file_dir": write_records(folder / "train" / "a.jsonl", 0, 6),
        "validation_file_dir": write_records(folder / "validation" / "b.jsonl", 6, 8),
        "output_dir": folder / out,
        "max_source_length": 400,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lora_dropout": 0,
        "report_to": "none",
        **changes,
    }
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


def manifest(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def evaluation_rows(folder, step) -> dict[str, tuple[float, float]]:
    """eval_records/step-N.jsonl: where -> (reward of chosen, reward of rejected)."""
    lines = (folder / "eval_records" / f"step-{step}.jsonl").read_text().splitlines()
    return {row["where"]: (row["chosen"], row["rejected"]) for row in map(json.loads, lines)}


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def both_agree(script, stage, words, model, **changes):
    """Runs the script in this process in batches of two, and in two processes in batches of one; compares all.

    The steps are plain gradient descent: Adam would hide a wrong scale, and blow rounding up.
    """
    changes |= {
        "model": model,
        "optim": "sgd",
        "learning_rate": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "max_steps": 3,
    }
    one = stage(script, *words("one", **changes), "--save_eval_records")
    flags = [*words("two", **{**changes, "per_device_train_batch_size": 1}), "--save_eval_records"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).resolve().parent.parent
    command = [*launch, str(root / f"{script}.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = Path(flags[flags.index("--output_dir") + 1])
    expected = adapter_weights(one)
    for name, value in adapter_weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for step in (2, 3):
        for where, rewards in evaluation_rows(one, step).items():
            assert evaluation_rows(two, step)[where] == pytest.approx(rewards, rel=1e-3, abs=1e-4)
    for log, other in zip(history(one), history(two), strict=True):
        for name in {"loss", "accuracy", "margin", "eval_loss", "eval_accuracy"} & log.keys():
            assert other[name] == pytest.approx(log[name], rel=1e-3, abs=1e-4), (name, log["step"])
