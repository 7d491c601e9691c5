"""Rows that a resumed run trains: every record of an epoch once, whatever the size of the steps before and after."""

import json
from collections import Counter

import pytest
import torch

from stagewise.training.resume.position import Grid, RowPosition
from tests.launching import ROOT, torchrun
from tests.launching import run as run_command


def test_a_place_is_counted_in_rows():
    grid = Grid(rows=13, batch=2, accumulation=2)  # 7 batches, steps of 4, 4, 4 and 1 rows
    assert (grid.step, grid.an_epoch) == (4, 4)
    assert [grid.after(steps) for steps in (0, 1, 3, 4, 9)] == [(0, 0), (0, 4), (0, 12), (1, 0), (2, 4)]
    begun = RowPosition(1, 6)  # 7 rows are left of this epoch: steps of 4 and 3 rows
    assert [grid.after(steps, begun) for steps in (0, 1, 2, 3)] == [(1, 6), (1, 10), (2, 0), (2, 4)]


@pytest.mark.parametrize(
    ("place", "epochs", "left"),
    [
        ((0, 0), 2, 8),
        ((0, 0), 0.5, 2),
        ((0, 6), 2, 6),  # 2 of the epoch's rest, 4 of the second
        ((1, 0), 2, 4),
        ((1, 4), 1.5, 1),  # to the row 8 of the second epoch
        ((1, 9), 1.5, -1),
        ((2, 0), 2, 0),
        ((2, 4), 2, -1),
        ((3, 0), 2, -1),
    ],
)
def test_the_steps_that_are_left(place, epochs, left):
    assert Grid(rows=13, batch=2, accumulation=2).left(RowPosition(*place), epochs) == left


def test_incomplete_batches_that_are_left_out_are_no_steps():
    grid = Grid(rows=13, batch=4, drop_last=True)
    assert (grid.an_epoch, grid.steps(3), grid.after(3)) == (3, 0, (1, 0))


# ── every record once ────────────────────────────────────────────────────────────────────────────────────────────────

RECORDS = 15


def write_records(path, pairs=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(RECORDS):
            record = {"conversations": [{"from": "human", "value": f"about {number} ."}]}
            if pairs:
                record |= {"chosen": "yes it rests", "rejected": "no"}
            else:
                record["conversations"].append({"from": "gpt", "value": "rest " * (1 + number % 3)})
            file.write(json.dumps(record) + "\n")
    return path.parent


def numbers_in(tokenizer, inputs, pairs=False):
    """The records of a batch by the numbers in their texts; a packed row holds several."""
    rows = inputs["input_ids"].tolist()
    text = " ".join(tokenizer.decode(row) for row in (rows[: len(rows) // 2] if pairs else rows))
    return [int(part.split()[0]) for part in text.split("about ")[1:]]


@pytest.fixture
def seen(monkeypatch):
    """seen(script, class): the records that each step of later runs trains, as [(step, number), …]."""
    found = []

    def watch(module, name, pairs=False):
        trainer = getattr(module, name)
        step = trainer.training_step

        def training_step(self, model, inputs, *args, **kwargs):
            numbers = numbers_in(self.processing_class, inputs, pairs)
            found.extend((self.state.global_step + 1, number) for number in numbers)
            return step(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", training_step)
        return found

    return watch


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint("llama")

    def make(*more, pairs=False, **flags):
        flags = {
            "model_name_or_path": base,
            "train_file_dir": write_records(tmp_path / "train" / "a.jsonl", pairs),
            "output_dir": tmp_path / "out",
            "num_train_epochs": 2,
            "save_steps": 1,
            "save_total_limit": 0,
            "eval_samples": 0,
            "report_to": "none",
            "resume_from_checkpoint": True,
            **flags,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", value)] + list(more)

    return make


def state_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())


@pytest.mark.parametrize("packing", [False, True])
def test_steps_of_another_size_train_every_record_once(stage, words, seen, packing):
    import supervised_finetuning

    found = seen(supervised_finetuning, "SFTTrainer")
    same = {"packing": packing, "model_max_length": 200}
    stage("supervised_finetuning", *words(**same, per_device_train_batch_size=1, max_steps=4))
    first = [number for _, number in found]
    # 4 rows are done; in steps of 3 rows until the middle of the second epoch, then in steps of 2
    out = stage("supervised_finetuning", *words(**same, per_device_train_batch_size=3, max_steps=5 if packing else 9))
    middle = state_of(out)
    stage(
        "supervised_finetuning",
        *words(**same, per_device_train_batch_size=1, gradient_accumulation_steps=2),
    )
    whole = Counter(number for _, number in found)
    assert whole == dict.fromkeys(range(RECORDS), 2), "over two epochs"
    in_epoch = [number for _, number in found][:RECORDS] if not packing else None
    if in_epoch:
        assert sorted(in_epoch) == list(range(RECORDS)) and in_epoch[: len(first)] == first
        # 15 rows: 4 steps of 1, 4 of 3 (11 rows), then in the second epoch one step of 3 rows and 6 of 2
        assert middle["epoch"] == pytest.approx(1 + 3 / 15)
        last = state_of(out)
        assert (last["global_step"], last["max_steps"], last["epoch"]) == (15, 15, 2.0)
    epochs = [log["epoch"] for log in state_of(out)["log_history"]]
    assert epochs == sorted(epochs)


def test_the_order_of_the_rows_does_not_change(stage, words, seen, tmp_path):
    import supervised_finetuning

    found = seen(supervised_finetuning, "SFTTrainer")
    same = {"packing": False, "model_max_length": 200}
    stage("supervised_finetuning", *words(**same, per_device_train_batch_size=4, output_dir=tmp_path / "whole"))
    expected = [number for _, number in found]
    found.clear()
    stage("supervised_finetuning", *words(**same, per_device_train_batch_size=4, max_steps=5))
    stage("supervised_finetuning", *words(**same, per_device_train_batch_size=2))
    assert [number for _, number in found] == expected


@pytest.mark.parametrize(("script", "name"), [("reward_modeling", "RewardTrainer"), ("dpo_training", "DPOTrainer")])
def test_pairs_are_trained_once_in_each_epoch(stage, words, seen, script, name):
    found = seen(__import__(script), name, pairs=True)
    full = {"use_peft": False} if script == "reward_modeling" else {}
    stage(script, *words(pairs=True, per_device_train_batch_size=2, max_steps=2, **full))
    stage(script, *words(pairs=True, per_device_train_batch_size=5, **full))
    assert Counter(number for _, number in found[:RECORDS]) == dict.fromkeys(range(RECORDS), 1)
    assert Counter(number for _, number in found) == dict.fromkeys(range(RECORDS), 2)


def test_rows_that_were_grouped_by_length_keep_their_steps(stage, words, capsys):
    grouped = {"packing": False, "train_sampling_strategy": "group_by_length", "model_max_length": 200}
    stage("supervised_finetuning", *words(**grouped, per_device_train_batch_size=2, max_steps=2))
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *words(**grouped, per_device_train_batch_size=4))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "group_by_length" in error and "rows per step of 4" in error and "was trained with 2" in error


SPY = """
import json, os, sys
sys.path.insert(0, {root!r})
import supervised_finetuning as script
from tests.training.resume.test_position import numbers_in

step = script.SFTTrainer.training_step

def training_step(self, model, inputs, *args, **kwargs):
    with open(os.path.join({folder!r}, "seen-" + os.environ["RANK"]), "a") as file:
        for number in numbers_in(self.processing_class, inputs):
            print(json.dumps([self.state.global_step + 1, number]), file=file)
    return step(self, model, inputs, *args, **kwargs)

script.SFTTrainer.training_step = training_step
script.main()
"""


@pytest.mark.distributed
def test_two_processes_and_one_and_two_again_train_every_record_once(stage, words, seen, tmp_path):
    import supervised_finetuning

    (tmp_path / "spy.py").write_text(SPY.format(root=str(ROOT), folder=str(tmp_path)))
    same = {"packing": False, "model_max_length": 200, "per_device_train_batch_size": 2, "max_train_samples": 14}
    # steps of 4 rows, of 2 to the middle of the second epoch, and of 4 again
    run_command(torchrun(str(tmp_path / "spy"), *words(**same, max_steps=2)))
    found = seen(supervised_finetuning, "SFTTrainer")
    stage("supervised_finetuning", *words(**same, max_steps=8))
    run_command(torchrun(str(tmp_path / "spy"), *words(**same)))
    for rank in (0, 1):
        found += map(tuple, map(json.loads, (tmp_path / f"seen-{rank}").read_text().splitlines()))
    first = Counter(number for step, number in found if step <= 5)
    second = Counter(number for step, number in found if step > 5)
    assert first == second == dict.fromkeys(range(14), 1)
    assert torch.load(tmp_path / "out" / "training_args.bin", weights_only=False).world_size == 2
