"""What scripts answer before torch has loaded: the torch of these tests ends whoever imports it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAGES = ["pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training"]
# How a script or tool is called -> words that it needs in any case, its flag for a model, exit code for a bad path.
SCRIPTS = {
    **{f"{stage}.py": (["--output_dir", "out"], "--model_name_or_path", 1) for stage in STAGES},
    "inference.py": (["--interactive"], "--base_model", 2),
    "evaluation.py": (["--output_dir", "out"], "--base_model", 2),
    "web_demo.py": ([], "--base_model", 2),
    "merge_peft_adapter.py": (["--lora_model", "{adapter}", "--output_dir", "out"], "--base_model", 1),
    "-m tools.quantize_model": (["--output_dir", "out"], "--model_name_or_path", 2),
    "-m tools.extend_vocabulary": (["--word_list", "words"], "--model_name_or_path", 1),
    "-m tools.show_model supervised_finetuning.py": ([], "--model_name_or_path", 2),
    "-m tools.show_data sft": ([], "--model_name_or_path", 1),
}
WITHOUT_MODEL = ["convert_dataset.py", "-m tools.build_tokenizer", "-m tools.export_gguf", "-m tools.report"]
WITHOUT_MODEL += ["-m tools.fetch_small_model", "-m tools.document_flags", "-m tools.check_environment"]


@pytest.fixture
def answer(tmp_path):
    """Runs a script where torch cannot be imported: (exit code, what it printed, what it said on stderr)."""
    for name in ("torch", "peft", "datasets", "accelerate"):
        package = tmp_path / "stubs" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise SystemExit('{name} was imported')\n")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")

    def run(script: str, *words: str) -> tuple[int, str, str]:
        words = [word.replace("{adapter}", str(tmp_path / "adapter")) for word in words]
        code = (
            f"import atexit, runpy, sys; sys.path.insert(0, {str(tmp_path / 'stubs')!r}); sys.argv = sys.argv[1:]; "
            "atexit.register(lambda: 'transformers' in sys.modules and print('it was imported', file=sys.stderr)); "
        )
        if script.startswith("-m "):
            _, module, *first = script.split()
            code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        else:
            module, first = script, []
            code += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, module, *first, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "119"})
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("script", [*SCRIPTS, *WITHOUT_MODEL])
def test_help_and_a_mistyped_flag(script, answer):
    code, out, err = answer(script, "--help")
    assert (code, err) == (0, "")
    assert len(out) > 100
    code, out, err = answer(script, *SCRIPTS.get(script, ([],))[0], "--no_such_flg", "1")
    assert (code, out) == (2, "")
    assert "no_such_flg" in err or "required" in err
    if script in SCRIPTS and "extend" not in script:
        assert err.startswith("error: --no_such_flg: no such flag")
        assert err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_is_not_there_or_is_refused(script, answer, tmp_path):
    needed, flag, code_of_paths = SCRIPTS[script]
    more = ["--reward_model_name_or_path", "some/model"] if "ppo" in script else []
    data = [] if flag == "--base_model" or "tools" in script else ["--train_file_dir", "data/pretrain/train"]
    code, out, err = answer(script, *needed, *more, *data, flag, "./nowhere")
    assert (code, out, err) == (code_of_paths, "", f"error: {flag} ./nowhere: no such directory\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "aquila", "auto_map": {"AutoConfig": "c.C"}}))
    code, out, err = answer(script, *needed, *more, *data, flag, str(model))
    assert (code, out) == (code_of_paths, "")
    assert err.startswith(f"error: {flag} {model}: Aquila models ship Python code that transformers ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("stage", STAGES)
def test_data_that_is_not_there(stage, answer, tmp_path):
    more = ["--reward_model_name_or_path", "some/model"] if "ppo" in stage else []
    flags = ["--model_name_or_path", "some/model", "--output_dir", "out", *more]
    for name in ("train_file_dir", "validation_file_dir"):
        code, out, err = answer(f"{stage}.py", *flags, f"--{name}", "/nowhere")
        assert (code, out, err) == (1, "", f"error: --{name}: there is no folder or file '/nowhere'\n")


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("evaluation.py", "compare"),
        ("evaluation.py", "benchmark_dir"),
    ],
)
def test_a_folder_that_is_not_there(script, flag, answer):
    code, _, said = answer(script, "--output_dir", "out", f"--{flag}", "no/such/folder")
    assert (code, said) == (2, f"error: --{flag} no/such/folder: no such directory\n")


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_that_is_not_there(stage, answer):
    more = ["--reward_model_name_or_path", "some/model"] if "ppo" in stage else []
    flags = ["--model_name_or_path", "some/model", "--output_dir", "out", *more]
    code, out, err = answer(f"{stage}.py", *flags, "--resume_from_checkpoint", "out/checkpoint-7")
    assert (code, out, err) == (1, "", "error: --resume_from_checkpoint out/checkpoint-7: no such folder\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--deepspeed", "z"], "--deepspeed z: no such file; zero2.json and zero3.json are ready-made"),
        (["--lora_rank", "0"], "--lora_rank: expected at least 1, found 0"),
        (["--max_steps", "1e3"], "--max_steps: expected a whole number, found '1e3'"),
        (["--bf16", "maybe"], "--bf16: expected True or False, found 'maybe'"),
        (["--save_strategy", "never"], "--save_strategy: expected one of no, steps, epoch, best, found 'never'"),
        (["--seed", "1", "2"], "--seed: expected one value, found 2: 1 2"),
        (["--seed"], "--seed: a value is missing"),
        (["--peft_path", "/nowhere"], "--peft_path /nowhere: no such directory"),
        (
            ["--lr_scheduler_kwargs", "{1"],
            """--lr_scheduler_kwargs: expected a dictionary such as '{"name": 1}', found '{1'""",
        ),
        (["--output_dir", "$NOT_SET/x"], "--output_dir $NOT_SET/x: the environment variable NOT_SET is not set"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_followed(words, said, answer):
    code, out, err = answer(
        "supervised_finetuning.py", "--model_name_or_path", "some/model", "--output_dir", "o", *words
    )
    assert (code, out, err) == (2, "", f"error: {said}\n")


def test_what_is_missing_is_named(answer):
    assert answer("ppo_training.py", "--output_dir", "o") == (
        2, "", "error: --model_name_or_path, --reward_model_name_or_path: missing. --help lists all flags\n"
    )  # fmt: skip
    code, _, err = answer("supervised_finetuning.py", "--model_name_or_path", "m")
    assert (code, err) == (2, "error: --output_dir: missing; give the folder that the run is written to\n")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_help(stage, answer):
    _, text, _ = answer(f"{stage}.py", "--help")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 119
    assert len(lines) < 260
    first = {"pretraining": "block_size", "reward_modeling": "model_name_or_path"}
    first |= {"supervised_finetuning": "model_max_length", "dpo_training": "beta"}
    first |= {"ppo_training": "reward_model_name_or_path"}
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags[0] == f"--{first[stage]}"
    assert len(set(flags)) == len(flags)
    assert not [flag for flag in flags if "-" in flag[2:] or flag.startswith("--no_")]
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[-2:] == ["The run", "Training"]
    assert flags.index("--learning_rate") > flags.index("--output_dir")
    script = (ROOT / f"{stage}.py").read_text()
    assert text.count(" \\\n") == script[: script.index('"""', 5)].count(" \\\n") > 0  # examples keep their line ends
    _, everything, _ = answer(f"{stage}.py", "--help", "all")
    every = [line.split()[0] for line in everything.splitlines() if line.startswith("  --")]
    assert every[: len(flags)] == flags
    assert {"--adam_beta1", "--label_names", "--ddp_bucket_cap_mb"} <= set(every)


def test_the_help_of_evaluation(answer):
    _, text, _ = answer("evaluation.py", "--help")
    assert "--test_file data/finetune/validation \\\n        --output_dir outputs/eval-sft\n" in text
    lengths = text[text.index("--max_target_length") :]
    assert "for generated answers see --max_new_tokens" in " ".join(lengths.split())


def test_a_reader_of_help_that_has_seen_enough(tmp_path):
    done = subprocess.run(
        f"{sys.executable} inference.py --help | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_file_of_flags_is_read_first(answer, tmp_path):
    Path(tmp_path, "run.yaml").write_text("model_name_or_path: ./nowhere\noutput_dir: o\nlearning_rat: 1\n")
    code, _, err = answer("supervised_finetuning.py", str(tmp_path / "run.yaml"))
    assert (code, err.split(";")[0]) == (2, "error: --learning_rat: no such flag")
