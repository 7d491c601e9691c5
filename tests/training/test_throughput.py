"""Tokens a second and memory in the log."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stagewise.training.throughput import TokenCount


class Model(nn.Module):
    def forward(self, input_ids=None, attention_mask=None):
        return input_ids


def test_tokens_are_counted_in_training_alone_and_without_padding():
    model = Model()
    count = TokenCount(model, torch.device("cpu"))
    ids = torch.zeros(2, 5, dtype=torch.long)
    model.train()
    model(input_ids=ids)
    model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    model.eval()
    model(input_ids=ids)
    assert count.read() == 10 + 8
    assert count.read() == 0, "read, it begins anew"


def test_the_log_counts_each_token_once(stage, tiny_checkpoint, tmp_path, monkeypatch):
    """Four steps of a row each: the tokens of all records of an epoch, over the seconds that a clock says."""
    import stagewise.training.throughput

    texts = ["drink water and rest " * 4, "the user asks " * 3, "the assistant answers", "rest when you have a fever"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    clock = iter(range(0, 10000, 10))
    monkeypatch.setattr(stagewise.training.throughput, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    out = stage(
        "pretraining", "--model_name_or_path", tiny_checkpoint("llama"), "--train_file_dir", tmp_path / "t",
        "--output_dir", tmp_path / "out", "--num_train_epochs", 1, "--per_device_train_batch_size", 1,
        "--packing", "False", "--logging_steps", 4, "--logging_first_step", "False", "--save_strategy", "no",
        "--report_to", "none",
    )  # fmt: skip
    (log,) = [log for log in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    tokens = json.loads((out / "run.json").read_text())["data"]["summary"]["train"]["tokens"]
    assert log["step"] == 4
    # the clock moves 10 seconds each time it is looked at: when the first step begins, and at the log
    assert log["tokens_per_second"] == pytest.approx(tokens / 10)
    assert 0 < log["memory_gib"] < 64
