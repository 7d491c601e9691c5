"""The model card: what the Hub reads of it, and what people do."""

import json
import re
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

import merge_peft_adapter
from stagewise.reports.model_card import card_text, cell, code, fenced
from tests.conftest import build_tiny_tokenizer
from tests.launching import run

LINEAGE = [
    {
        "stage": "sft",
        "base_model": "org/base",
        "from_hub": True,
        "method": "lora",
        "steps": 40,
        "data": {
            "train": {
                "read": 1200,
                "kept": 1100,
                "left_out": {"no answer": 90, "unknown role": 10},
                "files": ["a.jsonl"],
            },
            "validation": {"read": 50, "kept": 50, "files": ["v|1.jsonl"]},
        },
        "metrics": {
            "eval": {"eval_loss": 1.25, "eval_perplexity": 3.49, "eval_tokens": 900},
            "eval_before": {"eval_loss": 2.5, "eval_perplexity": 12.18},
        },
    },
    {"stage": "merge", "base_model": "org/base", "from_hub": True, "adapter": "outputs/sft"},
    {
        "stage": "ppo",
        "base_model": "outputs/sft-merged",
        "method": "lora",
        "steps": 8,
        "reward_model": {
            "path": "/somewhere/rm-merged",
            "lineage": [{"stage": "rm", "data": {"train": {"read": 70, "kept": 70, "files": ["p.jsonl"]}}}],
        },
        "data": {"train": {"read": 30, "kept": 30, "files": ["q.jsonl"]}},
        "metrics": {"eval": {"eval_reward": 0.5, "eval_reward_standard_error": 0.125}},
    },
    {"stage": "merge", "base_model": "outputs/sft-merged", "adapter": "outputs/ppo"},
]
MANIFEST = {"lineage": LINEAGE, "template": "vicuna", "largest_difference": 1e-5, "adapter_effect": 2.0}
APACHE = {"id": "apache-2.0", "source": "the front matter of org/base/README.md"}


def card(license=APACHE, manifest=MANIFEST, scores=False, template="{{ messages[0]['content'] }} ```") -> str:
    return card_text("mine", manifest, build_tiny_tokenizer(chat_template=template), license, scores)


def front(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_hub_reads_its_front_matter():
    assert front(card()) == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stagewise", "sft", "ppo", "lora"],
    }
    data = ModelCard(card()).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("apache-2.0", "org/base", "text-generation")


def test_a_reward_model_is_a_classifier():
    found = front(card(scores=True))
    assert found["pipeline_tag"] == "text-classification" and found["tags"][-1] == "reward-model"
    assert "AutoModelForSequenceClassification" in card(scores=True)


def test_a_base_that_is_a_directory_is_no_hub_name():
    lineage = [{**LINEAGE[0], "base_model": "models/base", "from_hub": False}, *LINEAGE[1:]]
    text = card(manifest={**MANIFEST, "lineage": lineage})
    assert "base_model" not in front(text) and "`models/base`" in text


def test_a_license_without_a_name_on_the_hub():
    own = {"id": "other", "name": "our-terms", "link": "LICENSE", "source": "org/base/LICENSE"}
    found = front(card(own))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "our-terms", "LICENSE")


def test_an_unknown_license_is_said_aloud():
    text = card({"id": "unknown", "source": "org/base has no README.md"})
    assert front(text)["license"] == "unknown"
    assert "**Unknown.** org/base has no README.md" in text and "Find out under which terms" in text


def test_it_tells_stages_data_metrics_and_template():
    lines = card().splitlines()
    for line in (
        "| 1 | supervised finetuning | `org/base` | lora | 40 | 1,100 |",
        "| 2 | adapter merged into its base | `org/base` |  |  |  |",
        "| 3 | proximal policy optimization, scored by `rm-merged` | `outputs/sft-merged` | lora | 8 | 30 |",
        "| SFT | train | 1,200 | 1,100 | 90 no answer, 10 unknown role | `a.jsonl` |",
        "| SFT | validation | 50 | 50 | none | `v\\|1.jsonl` |",
        "| RM | train | 70 | 70 | none | `p.jsonl` |",
        "| SFT | loss | 2.5 | 1.25 |",
        "| PPO | reward |  | 0.5 ± 0.12 |",
        "What goes well with rice? ```",
    ):
        assert line in lines, line
    assert "tokens" not in "".join(line for line in lines if line.startswith("| SFT |"))
    assert "````text" in lines, "the fence is longer than what stands behind it"


def test_an_adapter_made_elsewhere_has_little_to_tell():
    manifest = {"lineage": [{"stage": "merge", "base_model": "org/base", "from_hub": True}], "template": None}
    text = card(manifest=manifest, template=None)
    assert "merging an adapter that was trained elsewhere" in text
    assert "## Data" not in text and "## Metrics" not in text and "continues with texts" in text


def test_words_stay_words():
    assert cell("a|b <i>\nc") == "a\\|b &lt;i> c"
    assert code("a`b") == "`` a`b ``" and code("a|b") == "`a\\|b`"
    assert fenced("```", "text") == "````text\n```\n````"


# --- at the merge ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(stage, tiny_checkpoint, tmp_path):
    """(base, adapter of a real run)."""
    base = tiny_checkpoint("llama")
    words = ["--model_name_or_path", base, "--output_dir", tmp_path / "sft", "--max_steps", 2, "--eval_on_start"]
    words += ["--train_file_dir", "data/finetune/train", "--validation_file_dir", "data/finetune/validation"]
    words += ["--max_train_samples", 6, "--max_eval_samples", 4, "--eval_samples", 1, "--report_to", "none"]
    return base, stage("supervised_finetuning", *words)


def test_the_merge_writes_the_card(trained, tmp_path):
    base, adapter = trained
    (base / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    out = tmp_path / "merged"
    merge_peft_adapter.main(["--lora_model", str(adapter), "--output_dir", str(out)])
    run, text = json.loads((out / "run.json").read_text()), (out / "README.md").read_text(encoding="utf-8")
    assert run["license"] == {"id": "apache-2.0", "source": f"the text of {base.name}/LICENSE"}
    assert front(text)["license"] == "apache-2.0" and (out / "LICENSE").is_file(), "the terms go with the weights"
    step = json.loads((adapter / "run.json").read_text())["lineage"][-1]
    assert (step["steps"], step["method"], step["data"]["train"]["kept"]) == (2, "lora", 6)
    assert f"| 1 | supervised finetuning | `{base.name}` | lora | 2 | 6 |" in text
    assert re.search(r"\| SFT \| loss \| [\d.]+ \| [\d.]+ \|", text)
    assert str(tmp_path) not in text, "no path of this machine"


def test_a_merge_onto_a_base_without_license_says_so(trained, tmp_path):
    from loguru import logger

    said: list[str] = []
    number = logger.add(said.append, format="{level} {message}")
    try:
        merge_peft_adapter.main(["--lora_model", str(trained[1]), "--output_dir", str(tmp_path / "merged")])
    finally:
        logger.remove(number)
    assert any(line.startswith("WARNING license of the base: unknown") for line in said)
    assert front((tmp_path / "merged" / "README.md").read_text())["license"] == "unknown"


def test_the_hubs_own_command_takes_a_directory():
    """`hf upload NAME DIRECTORY` as docs/output.md writes it; nothing is sent."""
    shown = run([sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "--help"])
    assert "REPO_ID" in shown and "LOCAL_PATH" in shown and "PATH_IN_REPO" in shown and "--exclude" in shown
