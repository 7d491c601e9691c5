"""The rules of who may import whom, held by walking the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {
        "data_files",
        "strict_json",
        "turns",
        "conversation",
        "blocks",
        "arguments",
        "command_line",
        "flags",
        "flag_files",
        "help_text",
        "paths",
        "transformers_flags",
        "flag_checks",
        "page_texts",
        "shown_text",
        "whole_directory",
        "json_files",
        "file_hashes",
        "terminal_text",
        "json_lines",
        "only_shown",
    },
    {
        "bad_records",
        "json_values",
        "tables",
        "readers",
        "records",
        "sources",
        "rendering",
        "own_template",
        "reward_form",
        "cutting",
        "skeleton",
        "tool_forms",
        "pieces",
        "thinking",
        "chats",
        "cache",
        "locks",
        "control_tokens",
        "encoding",
        "examples",
        "tokenization",
        "truncation",
        "words",
        "preparation",
        "model_source",
        "first_look",
    },
    {
        "data_summary",
        "packing",
        "block_limit",
        "losses",
        "metrics",
        "evaluation_compare",
        "evaluation_csv",
        "evaluation_numbers",
        "evaluation_page",
        "evaluation_text",
        "attention",
        "fast_attention",
        "lazy_mask",
        "rope",
        "router",
        "shifted_attention",
        "subwords",
        "vocabulary",
        "validation",
        "forward",
        "sampling",
        "generation",
        "decoding",
        "terminal_input",
        "word_wrap",
        "results",
        "processes",
        "preemption",
        "speed",
        "curves",
        "eval_samples",
        "finiteness",
        "html_pieces",
        "terminal",
        "scanning",
        "lanes",
        "stream_account",
        "streaming",
        "shards",
        "weight_files",
    },
    {
        "model_tokenizer",
        "model_config",
        "quantisation",
        "scalar_head",
        "model",
        "generation_config",
        "targets",
        "experts",
        "adapter_files",
        "methods",
        "virtual_tokens",
        "ranks",
        "layers",
        "memory",
        "row_quantisation",
        "adapter",
        "merging",
        "merge_check",
        "checkpoint",
        "fingerprints",
        "identity",
        "place",
        "callbacks",
        "splits",
        "streamed_training",
        "language_model",
        "pairs",
        "policy",
        "reward",
        "rollout",
        "answer_evaluation",
        "schedule",
        "manifest",
        "lineage",
        "model_card",
        "run_page",
        "board",
        "output_dir",
        "dry_run",
        "settings",
        "trainer_flags",
        "advice",
        "speaker_arguments",
        "speaker_loading",
        "prompt_rows",
        "speaker",
        "evaluation_answers",
        "evaluation_arguments",
        "evaluation_folder",
        "evaluation_benchmarks",
        "evaluation_harness",
        "evaluation_pairs",
        "talk",
        "answer_file",
        "web_server",
    },
    {"run", "predecessor"},
]
WITHOUT_TORCH = LAYERS[0] | LAYERS[1] | {"data_summary"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"template"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


MODULES = {path.stem: imports(path) for path in (ROOT / "stagewise").glob("*.py") if path.stem != "__init__"}


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"stagewise/{name}.py stands in no layer"
    return found[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_what_stands_to_its_left(name):
    for imported in MODULES[name]:
        if imported.startswith("stagewise."):
            assert layer(imported.split(".")[1]) <= layer(name), f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_package_imports_nothing_from_the_root(name):
    assert not MODULES[name] & (SCRIPTS | {"template"})


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_these_import_no_torch(name):
    assert not {imported.split(".")[0] for imported in MODULES[name]} & {"torch"}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_never_import_scripts(name):
    assert not imports(ROOT / f"{name}.py") & SCRIPTS
