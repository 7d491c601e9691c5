"""The recipes: which command each of them starts, from what the environment and the command line say."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "ppo": "ppo_training.py",
    "dpo": "dpo_training.py",
}
SMALL_MODEL = "models/SmolLM2-135M-Instruct"
CPU_BFLOAT16 = str(int(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
OURS = ("MODEL", "REWARD_MODEL", "OUTPUTS", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "LAUNCH_DRY")


def bash(script, *flags, timeout=60, **environment):
    """Runs a script of the root; nothing of these variables is taken over from the tests' own environment."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        ["bash", str(ROOT / script), *flags],
        env={**kept, "PYTHON": sys.executable, "GPUS": "0", "CPU_BFLOAT16": CPU_BFLOAT16, **environment},
        cwd="/",  # a recipe is started from anywhere
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def dry(stage, *flags, **environment):
    """The words of the command that a recipe would start, and what it says."""
    done = bash(f"run_{stage}.sh", *flags, LAUNCH_DRY="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout), done.stderr


def value(words, flag):
    """What the last `flag` is given, as argparse takes it."""
    return words[len(words) - words[::-1].index(flag)]


def made(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")


# --- evaluations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_of_any_length_is_evaluated_five_times(stage, tmp_path):
    words, _ = dry(stage, OUTPUTS=str(tmp_path))
    assert value(words, "--eval_strategy") == "steps" and value(words, "--eval_steps") == "0.2"


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SCRIPTS)
def test_one_process_without_a_gpu(stage, tmp_path):
    words, _ = dry(stage, OUTPUTS=str(tmp_path))
    assert words[:2] == [sys.executable, SCRIPTS[stage]]
    assert value(words, "--output_dir") == str(tmp_path / stage)
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere bfloat16 is some fifty times slower than float32
    assert value(words, "--torch_dtype") == ("bfloat16" if fast else "float32")
    assert ("--bf16" in words) == fast
    for flag in ("--train_file_dir", "--validation_file_dir"):
        assert (ROOT / value(words, flag)).is_dir()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_visible_gpu_through_torchrun(stage, tmp_path):
    words, _ = dry(stage, OUTPUTS=str(tmp_path), GPUS="4")
    launcher = ["-m", "tools.launcher", "--nproc_per_node", "4", "--standalone", SCRIPTS[stage]]
    assert words[1:7] == launcher
    assert "--bf16" in words


def test_one_gpu_is_one_plain_process():
    words, _ = dry("sft", GPUS="1")
    assert words[1] == "supervised_finetuning.py"
    assert "--bf16" in words


def test_nproc_counts_in_place_of_the_gpus():
    assert dry("sft", NPROC="2")[0][3:5] == ["--nproc_per_node", "2"]
    assert dry("sft", NPROC="2", GPUS="8")[0][3:5] == ["--nproc_per_node", "2"]
    assert dry("sft", NPROC="1", GPUS="8")[0][1] == "supervised_finetuning.py"


def test_several_machines():
    words, _ = dry("sft", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", NPROC="8")
    launcher = ["--nproc_per_node", "8", "--nnodes", "2", "--node_rank", "1"]
    assert words[1:3] == ["-m", "tools.launcher"]
    assert words[3:14] == [*launcher, "--master_addr", "10.0.0.1", "--master_port", "29500", SCRIPTS["sft"]]
    words, _ = dry("sft", NNODES="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    launcher = ["--nproc_per_node", "1", "--nnodes", "2", "--node_rank", "0"]
    assert words[3:14] == [*launcher, "--master_addr", "10.0.0.1", "--master_port", "1234", SCRIPTS["sft"]]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("NPROC", "two", "NPROC=two: expected a number"),
        ("NPROC", "0", "NPROC=0: expected at least 1"),
        ("NNODES", "2x", "NNODES=2x: expected a number"),
        ("NODE_RANK", "-1", "NODE_RANK=-1: expected a number"),
        ("GPUS", "all", "GPUS=all: expected a number"),
    ],
)
def test_what_is_no_number_of_processes_is_named(name, value, says):
    done = bash("run_sft.sh", LAUNCH_DRY="1", **{"GPUS": "0", name: value})
    assert done.returncode == 2
    assert says in done.stderr


def test_several_machines_need_the_first_one_s_address():
    done = bash("run_sft.sh", LAUNCH_DRY="1", NNODES="2")
    assert done.returncode == 2
    assert "error: NNODES=2: MASTER_ADDR, the address of machine 0, is missing" in done.stderr
    assert done.stdout == ""


def test_a_port_of_one_machine():
    words, _ = dry("sft", NPROC="2", MASTER_PORT="1234")
    assert words[3:9] == ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", "1234"]


def test_deepspeed_starts_through_torchrun_also_for_one_process():
    words, _ = dry("sft", "--deepspeed", "zero2.json")
    assert words[1:6] == ["-m", "tools.launcher", "--nproc_per_node", "1", "--standalone"]


def test_gpus_are_counted_by_torch():
    done = bash("run_sft.sh", LAUNCH_DRY="1", GPUS="", CUDA_VISIBLE_DEVICES="")
    assert shlex.split(done.stdout)[1] == "supervised_finetuning.py"


# --- flags ----------------------------------------------------------------------------------------------------------


def test_flags_at_the_end_come_last_and_stay_whole():
    words, _ = dry("sft", "--max_steps", "10", "--output_dir", "a folder", "--run_name", "it's $HOME *")
    assert words[-6:] == ["--max_steps", "10", "--output_dir", "a folder", "--run_name", "it's $HOME *"]


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "earlier"), [("sft", "pt-merged"), ("rm", "sft-merged"), ("ppo", "sft-merged"), ("dpo", "sft-merged")]
)
def test_a_stage_starts_from_the_model_of_the_stage_before(stage, earlier, tmp_path):
    words, said = dry(stage, OUTPUTS=str(tmp_path))
    assert value(words, "--model_name_or_path") == SMALL_MODEL
    assert f"model: {SMALL_MODEL}, since there is no {tmp_path}/{earlier}" in said

    made(tmp_path, "pt-merged", "sft-merged", "rm-merged")
    words, said = dry(stage, OUTPUTS=str(tmp_path))
    assert value(words, "--model_name_or_path") == f"{tmp_path}/{earlier}"
    assert f"model: {tmp_path}/{earlier}\n" in said


@pytest.mark.parametrize("stage", SCRIPTS)
def test_model_from_the_environment_wins(stage, tmp_path):
    made(tmp_path, "pt-merged", "sft-merged")
    words, said = dry(stage, OUTPUTS=str(tmp_path), MODEL="Qwen/Qwen3-0.6B")
    assert value(words, "--model_name_or_path") == "Qwen/Qwen3-0.6B"
    assert "model: Qwen/Qwen3-0.6B, from MODEL" in said


def test_the_reward_model_of_ppo(tmp_path):
    def chosen(**environment):
        return value(dry("ppo", OUTPUTS=str(tmp_path), MODEL="m", **environment)[0], "--reward_model_name_or_path")

    (tmp_path / "rm").mkdir()
    assert chosen() == f"{tmp_path}/rm"
    made(tmp_path, "rm-merged")
    assert chosen() == f"{tmp_path}/rm-merged"
    assert chosen(REWARD_MODEL="some/classifier") == "some/classifier"


def test_ppo_without_a_reward_model_says_what_to_do(tmp_path):
    done = bash("run_ppo.sh", OUTPUTS=str(tmp_path), MODEL="m")
    assert done.returncode == 2
    assert (
        f"no {tmp_path}/rm-merged and no {tmp_path}/rm. bash run_rm.sh trains one, or give REWARD_MODEL" in done.stderr
    )


# --- as they stand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_recipe_runs_as_it_stands(stage, tmp_path, tiny_checkpoint):
    """Every flag of the recipe is one that the stage takes, and the data that it names is there."""
    models = {"MODEL": str(tiny_checkpoint("llama", max_position_embeddings=2048))}
    short = ["--max_steps", "1", "--max_train_samples", "2", "--max_eval_samples", "2"]
    if stage == "ppo":
        models["REWARD_MODEL"] = str(tiny_checkpoint("llama", task="score", max_position_embeddings=2048))
        short += ["--batch_size", "2", "--mini_batch_size", "2", "--max_target_length", "4"]
    done = bash(f"run_{stage}.sh", *short, OUTPUTS=str(tmp_path), NPROC="1", timeout=300, **models)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((tmp_path / stage / "run.json").read_text())
    assert (run["status"], run["steps"]) == ("finished", 1)
    assert (tmp_path / stage / "adapter_model.safetensors").is_file()


# --- the pipeline ---------------------------------------------------------------------------------------------------


def test_the_pipeline_hands_each_merged_model_on(tmp_path):
    done = bash("run_pipeline.sh", LAUNCH_DRY="1", OUTPUTS=str(tmp_path), MODEL="base/model")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    stages, merges, report = commands[0:10:2], commands[1:10:2], commands[10:]
    out = str(tmp_path)
    assert [words[1] for words in stages] == [SCRIPTS[s] for s in ("pt", "sft", "rm", "ppo", "dpo")]
    assert [value(words, "--model_name_or_path") for words in stages] == [
        "base/model",
        f"{out}/pt-merged",
        f"{out}/sft-merged",
        f"{out}/sft-merged",
        f"{out}/sft-merged",
    ]
    assert value(stages[3], "--reward_model_name_or_path") == f"{out}/rm-merged"
    for stage, merge in zip(stages, merges, strict=True):
        adapter = value(stage, "--output_dir")
        assert merge[1] == "merge_peft_adapter.py"
        assert value(merge, "--base_model") == value(stage, "--model_name_or_path")
        assert value(merge, "--lora_model") == value(merge, "--tokenizer_path") == adapter
        assert value(merge, "--output_dir") == f"{adapter}-merged"
        assert {"--eval_on_start", "--save_eval_records", "--overwrite_output_dir"} <= set(stage)
        assert "--overwrite_output_dir" in merge
    assert report == [[sys.executable, "-m", "tools.report", "--outputs", out]]
    assert [line.split("\t")[0] for line in (tmp_path / "seconds.tsv").read_text().splitlines()] == [
        "started",
        "pt",
        "sft",
        "rm",
        "ppo",
        "dpo",
    ]


# --- environment ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that has torch 2.12 and lacks the rest; what pip is asked goes to a file, constraints with it."""
    log = tmp_path / "pip.txt"
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
case "$*" in
    *find_spec*) exit "${{NO_TORCH:-0}}" ;;
    *importlib.metadata*) echo torch==2.12.0+cu130 ;;
    *tools.check_environment*) exit "${{CHECK:-1}}" ;;
    *pip*) echo "$*" >{log}; cat "${{@: -1}}" >>{log} ;;
esac
"""
    )
    path.chmod(0o755)
    return path, log


def test_the_torch_of_an_environment_is_never_replaced(fake_python):
    python, log = fake_python
    assert bash("launch.sh", "set_up", PYTHON=str(python)).returncode == 0
    asked, *constraints = log.read_text().splitlines()
    assert asked.startswith("-m pip install -r requirements.txt -c ")
    assert [line for line in constraints if line.startswith("torch==")] == ["torch==2.12.0+cu130"]
    assert "transformers==5.23.0" in constraints


def test_without_torch_the_tested_versions_are_installed(fake_python):
    python, log = fake_python
    bash("launch.sh", "set_up", PYTHON=str(python), NO_TORCH="1")
    assert log.read_text().splitlines()[0] == "-m pip install -r requirements.txt -c constraints.txt"


@pytest.mark.parametrize(("check", "code"), [("0", 0), ("2", 2)])
def test_nothing_is_installed_where_all_is_there_or_torch_is_too_old(fake_python, check, code):
    python, log = fake_python
    assert bash("launch.sh", "set_up", PYTHON=str(python), CHECK=check).returncode == code
    assert not log.exists()


def test_pins_lie_within_the_ranges():
    from tools.check_environment import requirements

    pins = {r.name.lower(): next(iter(r.specifier)).version for r in requirements(ROOT / "constraints.txt")}
    for requirement in requirements(ROOT / "requirements-dev.txt"):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_this_environment_has_what_is_required(capsys, tmp_path):
    from tools.check_environment import main

    main([str(ROOT / "requirements-dev.txt")])
    lacking = tmp_path / "requirements.txt"
    lacking.write_text("# a comment\nnumpy>=1\nno-such-package-here>=2  # why\npytest>=1000\n")
    with pytest.raises(SystemExit) as ended:
        main([str(lacking)])
    assert ended.value.code == 1
    assert "missing: no-such-package-here>=2, pytest>=1000 (found" in capsys.readouterr().err
    lacking.write_text("torch>=1000\n")
    with pytest.raises(SystemExit) as ended:
        main([str(lacking)])
    assert ended.value.code == 2
    assert "too old and is not replaced (torch>=1000 is needed)" in capsys.readouterr().err


# --- DeepSpeed's files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_leave_optimizer_and_schedule_to_the_flags(stage):
    config = json.loads((ROOT / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert "optimizer" not in config
    assert "scheduler" not in config
    for name in (
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ):
        assert config[name] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    if stage == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
