"""Two processes over gloo, DeepSpeed on a CPU, two machines, kill and resume: the commands a user runs."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stagewise.training.run import Run
from tests.conftest import adapter_weights
from tests.launching import environment, free_port, python, run, torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pt": "pretraining", "sft": "supervised_finetuning", "rm": "reward_modeling", "dpo": "dpo_training"}
TOPICS = ["fever", "rest", "water", "a cold", "sleep", "diet", "pain", "exercise"]


def record(stage: str, number: int) -> dict:
    topic = TOPICS[number % len(TOPICS)]
    question = {"from": "human", "value": f"what about {topic} {number}"}
    if stage == "pt":
        return {"text": f"a line about {topic} and number {number} " * (1 + number % 3)}
    if stage == "sft":
        return {"conversations": [question, {"from": "gpt", "value": f"drink water for {topic} " * (1 + number % 3)}]}
    return {"conversations": [question], "chosen": f"rest well with {topic}", "rejected": f"no {topic} " * 2}


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    """words("sft", "out", batch=1): flags of a short run of a stage on a tiny llama."""
    model = tiny_checkpoint("llama", max_position_embeddings=1024)

    def make(stage: str, out: str, batch: int = 1, **changes) -> list:
        data = tmp_path / f"{stage}.jsonl"
        data.write_text("".join(json.dumps(record(stage, n)) + "\n" for n in range(12)))
        length = {"pt": "block_size", "sft": "model_max_length"}.get(stage)
        flags = {
            "model_name_or_path": model,
            "train_file_dir": data,
            "validation_file_dir": data,
            "output_dir": tmp_path / out,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 2e-3,
            "lora_dropout": 0,
            "report_to": "none",
            **({length: 300} if length else {}),
            **changes,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", value)]

    return make


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def assert_same(found: Path, expected: Path, *, apart: float = 0.0, **tolerance) -> None:
    """All weights agree, but for a share `apart` of each tensor's elements.

    Adam divides a gradient by its own size: where it is next to nothing, rounding decides the sign of the step.
    """
    found, expected = adapter_weights(found), adapter_weights(expected)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        differing = ~torch.isclose(value, expected[name], **tolerance)
        assert differing.float().mean() <= apart, (name, (value - expected[name]).abs().max())


@pytest.mark.parametrize("stage_name", SCRIPTS)
def test_two_processes_are_one_process_with_twice_the_batch(stage_name, stage, words, tmp_path):
    script = SCRIPTS[stage_name]
    # Plain gradient descent: a loss that is wrong by a factor, which Adam would not see, shows.
    descent = {"optim": "sgd", "learning_rate": 0.5}
    one = stage(script, *words(stage_name, "one", batch=2, **descent))
    run(torchrun(script, *words(stage_name, "two", batch=1, **descent)), torchrun=True)
    assert_same(tmp_path / "two", one, rtol=1e-4, atol=1e-5)
    first, second = manifest(one), manifest(tmp_path / "two")
    assert (first["processes"], second["processes"]) == (1, 2)
    for name, value in first["metrics"]["eval"].items():
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second")):
            assert second["metrics"]["eval"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("zero", ["zero2.json", "zero3.json"])
@pytest.mark.parametrize("stage_name", SCRIPTS)
def test_deepspeed_trains_saves_merges_and_resumes(stage_name, zero, stage, words, tmp_path):
    script = SCRIPTS[stage_name]
    plain = stage(script, *words(stage_name, "plain", batch=2))
    flags = words(stage_name, "ds", deepspeed=ROOT / zero, save_steps=2)
    run(torchrun(script, *flags))
    out = tmp_path / "ds"
    assert_same(out, plain, apart=0.02, rtol=2e-3, atol=2e-4)
    stage("merge_peft_adapter", "--lora_model", out, "--output_dir", tmp_path / "merged")
    assert manifest(tmp_path / "merged")["status"] == "finished"
    # as if it had been killed while it wrote its last checkpoint
    whole = adapter_weights(out)
    (out / "checkpoint-4" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    run(torchrun(script, *flags, "--resume_from_checkpoint", "True"))
    for name, value in adapter_weights(out).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["zero2.json", "zero3.json"])
def test_deepspeed_full_training_saves_the_whole_model(zero, stage, words, tmp_path):
    flags = words("sft", "plain", batch=2, use_peft=False)
    del flags[flags.index("--lora_dropout") : flags.index("--lora_dropout") + 2]
    plain = stage("supervised_finetuning", *flags)
    flags = words("sft", "ds", use_peft=False, deepspeed=ROOT / zero)
    del flags[flags.index("--lora_dropout") : flags.index("--lora_dropout") + 2]
    run(torchrun("supervised_finetuning", *flags))
    assert_same(tmp_path / "ds", plain, apart=0.02, rtol=5e-3, atol=2e-3)


def test_a_run_that_ends_leaves_the_group_of_processes(stage, words, tmp_path, monkeypatch):
    """What is left of it when Python ends may abort a process that has finished."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run_of = Run.train
        monkeypatch.setattr(Run, "train", lambda *args, **kwargs: (run_of(*args, **kwargs), dist.barrier()))
        stage("supervised_finetuning", *words("sft", "one"))
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_two_machines_are_one_process_with_twice_the_batch(stage, words, tmp_path):
    descent = {"optim": "sgd", "learning_rate": 0.5}
    one = stage("supervised_finetuning", *words("sft", "one", batch=2, **descent))
    port = free_port()
    machines = [
        subprocess.Popen(
            torchrun(
                "supervised_finetuning",
                *words("sft", "two", batch=1, **descent),
                launcher=(
                    *("--nproc_per_node", "1", "--nnodes", "2", "--node_rank", rank),
                    *("--master_addr", "127.0.0.1", "--master_port", port, "--local_addr", address),
                ),
            ),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, address in ((0, "127.0.0.1"), (1, "127.0.0.2"))
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert_same(tmp_path / "two", one, rtol=1e-4, atol=1e-5)


COUNTED = """
import os, sys
sys.path.insert(0, {root!r})
import supervised_finetuning as stage
from stagewise.chat import encoding
from stagewise.data import splits

many = encoding.ConversationEncoder.many

def counted(self, conversations):
    with open({count!r}, "a") as file:
        file.write(os.environ["RANK"] + chr(10))
    return many(self, conversations)

encoding.ConversationEncoder.many = counted
splits.HEAD_START = {head_start}
stage.main()
"""


def shared_cache(tmp_path, words, head_start: float, *more) -> subprocess.CompletedProcess:
    """Two processes train with one --cache_dir; `count` in tmp_path has a line for every time that one encoded."""
    script = tmp_path / "counted.py"
    script.write_text(COUNTED.format(root=str(ROOT), count=str(tmp_path / "count"), head_start=head_start))
    flags = words("sft", "out", cache_dir=tmp_path / "cache", max_steps=1, on_bad_record="skip")
    command = torchrun(str(script.with_suffix("")), *flags, *more)
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_of_two_processes_one_encodes_and_the_other_reads_the_cache(words, tmp_path):
    done = shared_cache(tmp_path, words, 1.0)
    assert done.returncode == 0, done.stderr[-6000:]
    # the training records and those of validation, 12 each, one chunk: by the first process, whose log is seen
    assert (tmp_path / "count").read_text().split() == ["0", "0"]
    first = manifest(tmp_path / "out")["data"]
    again = shared_cache(tmp_path, words, 0.0, "--overwrite_cache", "True", "--overwrite_output_dir")
    assert again.returncode == 0, again.stderr[-6000:]
    assert sorted((tmp_path / "count").read_text().split()[2:]) in (["0", "0"], ["1", "1"])
    assert manifest(tmp_path / "out")["data"] == first
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_error_in_the_data_ends_both_processes(words, tmp_path):
    flags = words("sft", "out", cache_dir=tmp_path / "cache", max_steps=1)
    (tmp_path / "sft.jsonl").write_text(json.dumps(record("sft", 0)) + "\n{\n")
    done = subprocess.run(
        torchrun("supervised_finetuning", *flags),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "error: sft.jsonl:2: not JSON" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    assert not list((tmp_path / "cache").iterdir())


def started(command: list[str], until: Path) -> subprocess.Popen:
    """A command in the background, once `until` is there."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 240
    while not until.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {until.name} was there"
        assert time.time() < deadline, f"{until.name} was not there after four minutes"
        time.sleep(0.05)
    return process


def test_killed_and_started_again_it_goes_on_from_the_last_whole_checkpoint(words, tmp_path):
    long = {"max_steps": 40, "save_steps": 5}
    run(python("supervised_finetuning", *words("sft", "whole", **long)))
    command = python("supervised_finetuning", *words("sft", "killed", **long), "--resume_from_checkpoint", "True")
    out = tmp_path / "killed"
    process = started(command, out / "checkpoint-10" / "whole.json")
    process.kill()
    process.wait()
    assert not (out / "adapter_model.safetensors").exists()
    output = run(command)
    assert "finished" in output
    assert_same(out, tmp_path / "whole", rtol=0, atol=0)


def test_a_termination_signal_saves_and_stops(words, tmp_path):
    flags = words("sft", "stopped", max_steps=4000, save_steps=5)
    out = tmp_path / "stopped"
    process = started(python("supervised_finetuning", *flags), out / "checkpoint-5" / "whole.json")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert manifest(out)["status"] == "stopped"
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (last / "whole.json").is_file()
