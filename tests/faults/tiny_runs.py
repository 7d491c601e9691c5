"""Short runs of every stage on tiny random models: what the fault injection breaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conftest import build_tiny_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TOPICS = [
    "soup",
    "tea",
    "a walk",
    "my garden",
    "bread",
    "a train ride",
    "paint",
    "rain",
    "a chair",
    "salt",
    "figs",
    "ink",
]
STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training")


def record_of(script: str, topic: str) -> dict[str, Any]:
    if script == "pretraining":
        return {"text": f"all about {topic}, and then some more about {topic}"}
    turns = [{"from": "human", "value": f"tell me about {topic}"}]
    if script in ("reward_modeling", "dpo_training"):
        return {"conversations": turns, "chosen": f"gladly: {topic} is fine", "rejected": "no"}
    return {"conversations": [*turns, {"from": "gpt", "value": f"{topic} is fine"}]}


def write_records(script: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record_of(script, topic)) + "\n" for topic in TOPICS]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


def words_of(
    script: str, folder: Path, tiny_checkpoint: Callable[..., Path], out: str = "out", **changes
) -> list[str]:
    """The flags of six optimizer steps of two records each, a checkpoint at each step; None leaves a flag out."""
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    flags: dict[str, Any] = {
        "model_name_or_path": tiny_checkpoint("llama", tokenizer=tokenizer),
        "train_file_dir": write_records(script, folder / script),
        "output_dir": folder / out,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lora_dropout": 0,
        "logging_steps": 1,
        "report_to": "none",
    }
    if script in ("pretraining", "supervised_finetuning"):
        flags |= {"packing": False}
    else:
        flags |= {"max_source_length": 200}
    if script == "ppo_training":  # a rollout is one update, so that each step has its checkpoint
        scorer = tiny_checkpoint("qwen3", task="score", tokenizer=tokenizer)
        flags |= {"reward_model_name_or_path": scorer, "batch_size": 2, "max_target_length": 8, "ppo_epochs": 1}
    flags |= changes
    return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint or a result learned: its adapter or model, and PPO's value head."""
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").is_file() else "model.safetensors"
    found = load_file(folder / name)
    if (folder / "ppo_state.pt").is_file():
        found |= torch.load(folder / "ppo_state.pt", weights_only=True)["value_head"]
    return found


def moments_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What the optimizer of a checkpoint remembers of each weight."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, kept in state.items() for name, value in kept.items()
    }


def is_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


def all_finite(folder: Path) -> bool:
    """Whether every weights file below a folder holds nothing but finite numbers."""
    files = list(folder.rglob("*.safetensors"))
    return all(bool(value.isfinite().all()) for path in files for value in load_file(path).values())
