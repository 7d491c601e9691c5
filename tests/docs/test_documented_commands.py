"""Every command of the README and the documents is run here, or by another test, or says that it needs a GPU.

A page's commands are run in their order, in a folder that looks like the project after the README's commands, with a
tiny model that has the small model's tokenizer, a step or two each.
"""

import csv
import gzip
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.check_environment import requirements

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "data/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md") if "_zh" not in p.name),
]
GPU = re.compile(r"#.*\bneeds (a GPU|GPUs|\d+ GPUs)")
STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "ppo_training", "dpo_training")
# Commands that another test runs, with its name.
ELSEWHERE = {
    r"(MODEL=\S+ )?bash run_pipeline\.sh": "tests/test_recipes.py::test_the_pipeline_hands_each_merged_model_on",
    r"bash launch\.sh set_up": (
        "tests/test_recipes.py::test_nothing_is_installed_where_all_is_there_or_torch_is_too_old"
    ),
    r"NNODES=2 .*MASTER_ADDR=127\.0\.0\.1 ": (
        "tests/test_distributed.py::test_two_machines_are_one_process_with_twice_the_batch"
    ),
    r"NPROC=\d+ bash run_": "tests/test_distributed.py::test_two_processes_are_one_process_with_twice_the_batch",
    r"python -m tools\.document_flags": "tests/docs/test_docs.py::test_the_tables_of_flags_are_what_the_code_says",
    r"python -m mkdocs build": "tests/docs/test_site.py::test_the_site_is_built_without_a_network_and_needs_none",
    r"(transformers serve|curl http://127\.0\.0\.1:)": (
        "tests/docs/test_serving.py::test_transformers_own_server_answers_as_we_do"
    ),
    r"python inference\.py .*--rope_scaling dynamic --interactive": (
        "tests/test_inference.py::test_a_talk_over_a_pipe_has_history_and_a_seed"
    ),
    r"python inference\.py (?!.*--rope_scaling).*--interactive": "tests/test_inference.py",
    r"python web_demo\.py": "tests/test_web_demo.py",
    r"python evaluation\.py .*--benchmarks .*--benchmark_dir": (
        "tests/test_evaluation.py::test_a_benchmark_from_a_folder_with_a_model_whose_answers_are_known"
    ),
    r"python benchmarks/memory\.py --dry_run": "tests/benchmarks/test_memory.py::test_the_estimates_alone_are_printed",
    r"python benchmarks/memory\.py --table": (
        "tests/benchmarks/test_memory.py::test_rows_are_kept_as_they_are_finished_and_the_table_comes_last"
    ),
}
# Commands that no test can run, with the reason.
BY_HAND = {
    r"git clone …": "the address is left out",
    r"bash (run_tests\.sh|\.ci/run)": "it is what runs this test",
    r"(python -m venv )?outputs/vllm\b.*": "another environment, of a gigabyte",
    r"curl http://127\.0\.0\.1:\d+/classify": "vLLM, in another environment",
    r"hf (auth login|upload )": "an account of the Hub",
    r"python evaluation\.py (?!.*--benchmark_dir).*--benchmarks": "the Hub, which the sets come from",
    r"python -m tools\.export_gguf": "llama.cpp's converter, and requirements-llama-cpp.txt, which compiles",
    r"python benchmarks/data\.py": "a file of conversations, and LLaMA-Factory in another environment",
    r"python benchmarks/vocabulary\.py": "a book, and many minutes of training",
}


@dataclass(frozen=True)
class Command:
    page: str
    text: str  # one line, without its comment
    needs_gpu: bool


def commands_of(page: str) -> list[Command]:
    """The commands of a page's shell blocks. A mark in a block's first line, if that is a comment, is for all."""
    found = []
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        block = re.sub(r" -d '\{.*?\}'", lambda sent: sent[0].replace("\n", " "), block, flags=re.DOTALL)
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        whole = bool(lines[0].startswith("#") and GPU.search(lines[0]))
        for line in lines:
            words = shlex.split(line, comments=True)
            if words:
                code = re.sub(r"\s+#.*$", "", line).removesuffix("&").strip()
                found += [Command(page, part, whole or bool(GPU.search(line))) for part in code.split(" && ")]
    return found


def first(table: dict[str, str], command: str) -> str | None:
    return next((value for pattern, value in table.items() if re.match(pattern, command)), None)


def way_of(command: Command) -> str:
    """gpu, elsewhere, by hand, install, cd, or run; anything else is an AssertionError."""
    text = command.text
    if command.needs_gpu:
        return "gpu"
    if first(BY_HAND, text):
        return "by hand"
    if first(ELSEWHERE, text):
        return "elsewhere"
    if re.match(r"cd \w+$", text):
        return "cd"
    if re.match(r"pip install -r \S+", text):
        return "install"
    words = [word for word in shlex.split(text) if not re.match(r"[A-Z_]+=", word)]
    recipe = words[0] == "bash" and re.fullmatch(r"run_(pt|sft|rm|ppo|dpo)\.sh", words[1])
    script = words[0] == "python" and (ROOT / words[1]).is_file()
    module = words[:2] == ["python", "-m"] and words[2].startswith("tools.")
    assert recipe or script or module, (
        f"{command.page}: no test runs this, and it is not marked '# needs a GPU': {text}"
    )
    return "run"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_marked(page):
    for command in commands_of(page):
        way_of(command)


def test_no_command_stands_in_a_block_that_is_not_looked_at():
    """Blocks of text and the like: what a page says, not what a reader starts."""
    started = re.compile(r"(\w+=\S+ )*(python|bash|torchrun|deepspeed|pip|curl|hf|transformers|vllm|git) ")
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines() if language != "bash" else ():
                assert not started.match(line) or first(BY_HAND, line), f"{page}: mark it as bash: {line}"


def test_the_other_tests_are_there():
    for name in ELSEWHERE.values():
        path, _, test = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_a_command_that_nobody_runs_is_found():
    for text in ("make all", "python no_such_script.py", "bash run_everything.sh", "torchrun --nproc_per_node 8 x.py"):
        with pytest.raises(AssertionError, match="no test runs this"):
            way_of(Command("page", text, needs_gpu=False))


# --- running them ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(tmp_path_factory, smollm):
    """The project after the README's commands: samples, a tiny model for the small one, and what stages wrote."""
    from transformers import AutoTokenizer

    from tests.conftest import build_tiny_model

    house = tmp_path_factory.mktemp("house")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*.json"), ROOT / "tools", ROOT / "stagewise"]:
        (house / path.name).symlink_to(path)
    shutil.copytree(ROOT / "data", house / "data")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "eos_token_id": 2, "pad_token_id": 2}
    for task, names in {
        "causal": ("models/SmolLM2-135M-Instruct", "outputs/pt-merged", "outputs/sft-merged", "outputs/dpo-merged"),
        "score": ("outputs/rm-merged",),
    }.items():
        for name in names:
            build_tiny_model("llama", task=task, **shape).save_pretrained(house / name)
            tokenizer.save_pretrained(house / name)
    write_files(house)
    run_in(
        house,
        "python supervised_finetuning.py --model_name_or_path models/SmolLM2-135M-Instruct --output_dir outputs/sft "
        "--train_file_dir data/finetune/train",
    )
    for name in ("base", "dpo"):
        measured = f"--model_name_or_path outputs/{name.replace('base', 'pt')}-merged --output_dir outputs/eval-{name}"
        run_in(house, f"python evaluation.py --test_file data/finetune/validation {measured}")
    return house


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The commands that have been run in the house."""
    return set()


def write_files(house: Path) -> None:
    """What the pages' commands read: files that a reader has."""
    lines = (ROOT / "data/finetune/train/english.jsonl").read_text(encoding="utf-8").splitlines()
    (house / "data/cooking").mkdir()
    (house / "data/cooking/a.jsonl").write_text("\n".join(lines[:20]) + "\n", encoding="utf-8")
    with gzip.open(house / "data/chat.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines[20:40]) + "\n")
    turns = [json.loads(line)["conversations"][:2] for line in lines[:30]]
    pairs = [{"question": question["value"], "answer": answer["value"]} for question, answer in turns]
    alpaca = [{"instruction": pair["question"], "input": "", "output": pair["answer"]} for pair in pairs]
    (house / "alpaca.json").write_text(json.dumps(alpaca), encoding="utf-8")
    (house / "download.json").write_text(json.dumps(alpaca)[:-400], encoding="utf-8")
    for opened in (open, gzip.open):
        with opened(
            house / ("faq.csv" if opened is open else "faq.csv.gz"), "wt", encoding="utf-8", newline=""
        ) as file:
            table = csv.DictWriter(file, ["question", "answer"])
            table.writeheader()
            table.writerows(pairs)
    (house / "words.txt").write_text("感冒\n发烧\n", encoding="utf-8")
    (house / "prompts.jsonl").write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    (house / "sft.jsonl").write_text("\n".join(lines[:40]) + "\n", encoding="utf-8")
    (yaml,) = re.findall(r"^```yaml\n(# run\.yaml.*?)^```$", (ROOT / "docs/arguments.md").read_text(), re.M | re.S)
    (house / "run.yaml").write_text(yaml, encoding="utf-8")


def shortened(script: str, words: list[str]) -> list[str]:
    """The words of a command with flags behind them that make it short; the last of a flag counts."""
    if script == "ppo_training":
        return [*words, "--rollouts", "1", "--batch_size", "2", "--mini_batch_size", "2", "--max_target_length", "4",
                *COMMON, "--per_device_train_batch_size", "2"]  # fmt: skip
    if script in STAGES:
        schedule = (
            ["--max_steps", "6", "--tinit", "1", "--tfinal", "1"] if "adalora" in words else ["--max_steps", "2"]
        )
        weighed = "--data_weights" in words and "--streaming" in words  # each source then has a number of its own
        limit = "--block_size" if script == "pretraining" else "--model_max_length"
        longer = [limit, str(2 * CONTEXT)] if "--rope_scaling" in words else []
        return [*words, *schedule, *longer, *COMMON[: -2 if weighed else None]]
    if script in ("merge_peft_adapter", "tools.quantize_model") or (
        script in ("tools.extend_vocabulary", "tools.build_tokenizer") and "--output_dir" in words
    ):
        return [*words, "--overwrite_output_dir"]
    if script == "inference":
        return [*words, "--max_new_tokens", "4", "--overwrite_output_file", "--device", "cpu"]
    if script == "evaluation" and "--test_file" in words:
        spoken = [] if "outputs/rm-merged" in words else ["--max_new_tokens", "4"]  # a reward model says nothing
        return [*words, *spoken, "--max_samples", "4", "--overwrite_output_dir"]
    if script == "evaluation":
        return [*words, "--overwrite_output_dir"]
    return [*words, "--overwrite"] if script == "convert_dataset" else words


CONTEXT = 2048  # of the tiny model; a page's longer rows are twice as long
# A row at a time: of the small model's tokenizer, a row's logits are more than the tiny model itself.
COMMON = ["--save_strategy", "no", "--report_to", "none", "--overwrite_output_dir", "--max_eval_samples", "4",
          "--eval_samples", "0", "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1",
          "--max_train_samples", "16"]  # fmt: skip


def run_in(house: Path, text: str) -> None:
    """Runs a command in this process, from the house."""
    text = text.replace("Qwen/Qwen3-0.6B", "models/SmolLM2-135M-Instruct")
    words = shlex.split(text)
    if "bash" in words:  # a recipe: the command that it starts
        environment = {**os.environ, "LAUNCH_DRY": "1", "PYTHON": "python", "GPUS": "0", "OUTPUTS": "outputs"}
        environment |= {"CPU_BFLOAT16": "1"}
        shell = subprocess.run(["bash", "-c", text], cwd=house, env=environment, capture_output=True, text=True)
        assert shell.returncode == 0, shell.stderr
        words = shlex.split(shell.stdout)
    assert words[0] == "python", words
    script, words = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    before, argv = os.getcwd(), sys.argv
    os.chdir(house)
    try:
        module = importlib.import_module(script)
        sys.argv = [script, *shortened(script, words)]
        module.main()
    except SystemExit as ended:
        assert ended.code in (0, None), f"{shlex.join(sys.argv)}: {ended.code}"
    finally:
        os.chdir(before)
        sys.argv = argv


def runnable(page: str) -> list[str]:
    return [command.text for command in commands_of(page) if way_of(command) == "run"]


def not_yet_run(commands: list[str], done: set[str]) -> list[str]:
    """A page's commands without those at its beginning that ran before, on another page, in the same order."""
    new = next((n for n, text in enumerate(commands) if text not in done), len(commands))
    return commands[new:]


def test_only_what_stands_at_a_pages_beginning_is_passed_over():
    assert not_yet_run(["a", "b", "c", "a"], {"a", "b"}) == ["c", "a"]
    assert not_yet_run(["c", "a"], {"a", "b"}) == ["c", "a"]
    assert not_yet_run(["a", "b"], {"a", "b"}) == []


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_the_commands_of_a_page_run(page, house, ran):
    for text in not_yet_run(runnable(page), ran):
        run_in(house, text)
        ran.add(text)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_installed_is_a_file_of_requirements(page):
    for command in commands_of(page):
        if way_of(command) == "install":
            assert requirements(ROOT / shlex.split(command.text)[3])
