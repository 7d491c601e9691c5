"""The documents: true to the code, and the Chinese ones to the English ones."""

import argparse
import importlib
import inspect
import json
import os
import re
import shlex
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import yaml

from stagewise.config.command_line import given_on, known_names
from stagewise.config.flags import flags_of as flags_by_name
from stagewise.config.stages import BY_SCRIPT, STAGES
from stagewise.data import mixture as sources
from stagewise.errors import ArgumentError
from tools import show_data

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    ("README.md", "README_zh.md"),
    *sorted((f"docs/{p.name}", f"docs/{p.stem}_zh.md") for p in ROOT.glob("docs/*.md") if not p.stem.endswith("_zh")),
]
ENGLISH = [english for english, _ in PAIRS]
ALONE = ["CONTRIBUTING.md", "benchmarks/README.md", "data/README.md"]  # in one language
DOCUMENTS = [*ENGLISH, *(chinese for _, chinese in PAIRS), *ALONE]
RECIPES = sorted(path.name for path in ROOT.glob("run_*.sh"))
STARTED_BY = {
    "run_pt.sh": "pretraining",
    "run_sft.sh": "supervised_finetuning",
    "run_rm.sh": "reward_modeling",
    "run_ppo.sh": "ppo_training",
    "run_dpo.sh": "dpo_training",
}
ARGPARSE = (
    "benchmarks.data",
    "benchmarks.devices",
    "benchmarks.long_context",
    "benchmarks.memory",
    "benchmarks.vocabulary",
    "convert_dataset",
    "tools.build_tokenizer",
    "tools.export_gguf",
    "tools.extend_vocabulary",
    "tools.fetch_small_model",
    "tools.report",
)  # scripts that have a plain argparse parser
WITHOUT_FLAGS = {"run_pipeline.sh", "tools.document_flags", "tools.check_environment"}
# Files that a run, or its reader, makes.
MADE = {
    "run.json",
    "run.yaml",
    "rejected.jsonl",
    "whole.json",
    "belongs.json",
    "config.json",
    "alpaca.json",
    "faq.csv",
    "sft.jsonl",
}
MADE |= {"users.txt", "generation_config.json", "trainer_state.json"}
MADE |= {"stream-N.json", "rejected-N.jsonl", "quantization.json", "tokenizer.json", "generation_config.json"}
# Files and flags of other projects.
MADE |= {"config.py", "main.py", "dataset_info.json"}
OTHERS = {"--strict", "--num_gpus"}
OTHERS |= {"--enable", "--continuous"}  # they begin --enable-lora and --continuous-batching
OTHERS |= {"--faults"}  # of the tests


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# --- what there is ---------------------------------------------------------------------------------------------------


@cache
def parsers() -> dict[str, argparse.ArgumentParser | list[type]]:
    """The parser of every script that takes flags, or their dataclasses, by module name."""
    from tools.document_flags import MERGE, USERS, dataclasses_of
    from tools.document_flags import flags_of as kinds_of

    found = {script: dataclasses_of(script) for script in BY_SCRIPT} | {script: kinds_of(script) for script in USERS}
    found |= {name: importlib.import_module(name).FLAGS for name in (MERGE, "tools.quantize_model")}
    return {**found, **{name: argparse_of(name) for name in ARGPARSE}}


def argparse_of(name: str) -> argparse.ArgumentParser:
    """The parser that a script makes for itself."""
    found = []

    class Stop(Exception):
        pass

    def parse_known_args(self, *args, **kwargs):
        found.append(self)
        raise Stop

    start = importlib.import_module(name).main
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args), pytest.raises(Stop):
        start([]) if inspect.signature(start).parameters else start()
    return found[0]


def flags_of(parser: argparse.ArgumentParser | list[type]) -> set[str]:
    if isinstance(parser, list):
        return {"--help", *(f"--{name}" for name in known_names(flags_by_name(parser)))}
    return {option for action in parser._actions for option in action.option_strings}


@cache
def torchrun_flags() -> set[str]:
    from torch.distributed.run import get_args_parser

    return flags_of(get_args_parser())


@cache
def earlier_flags() -> set[str]:
    from stagewise.config.command_line import ALWAYS_SO, NOT_YET, RENAMED

    return {f"--{name}" for name in (*ALWAYS_SO, *NOT_YET, *RENAMED, "group_by_length")}


# --- commands --------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The commands of a piece of shell, as words; comments are left out and continued lines joined."""
    text = re.sub(r" -d '\{.*?\}'", lambda sent: sent[0].replace("\n", " "), text, flags=re.DOTALL)  # curl's JSON
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines for part in line.split(" && ") if (words := shlex.split(part, comments=True))]


def target(words: list[str]) -> tuple[str | None, list[str], list[str]]:
    """(script, words before it, words behind it) of a command that starts one of ours; script None for others."""
    for place, word in enumerate(words):
        name = Path(word).name
        if word == "-m" and words[place + 1] == "tools.show_model":  # a stage's script and its flags
            return words[place + 2].removesuffix(".py"), words[:place], [*words[place + 3 :], "--output_dir", "x"]
        if word == "-m" and words[place + 1] in ("venv", "mkdocs"):
            return None, [], []
        if word == "-m" and words[place + 1].startswith("tools."):
            return words[place + 1], words[:place], words[place + 2 :]
        if word.startswith("benchmarks/") and (ROOT / word).is_file():
            return f"benchmarks.{name.removesuffix('.py')}", words[:place], words[place + 1 :]
        if (name.endswith(".py") or name.startswith("run_")) and (ROOT / name).is_file():
            return name.removesuffix(".py"), words[:place], words[place + 1 :]
    return None, words, []


def check_command(words: list[str]) -> None:
    """Fails where a command names a script or a flag that does not exist, or gives a flag what it does not take."""
    script, before, behind = target(words)
    asked = [word.partition("=")[0] for word in behind if word.startswith("--")]
    if script is None:
        assert "python" not in before, f"no such script: {shlex.join(words)}"
        return
    if "torchrun" in before:
        launcher = [word for word in before if word.startswith("--")]
        assert set(launcher) <= torchrun_flags(), f"torchrun has no {set(launcher) - torchrun_flags()}"
    if script in WITHOUT_FLAGS or script == "run_tests.sh":
        own = {"--faults"} if script == "run_tests.sh" else set()  # which tests/conftest.py adds to pytest's
        assert set(asked) <= own, f"{script} takes no such flags: {asked}"
        return
    if script == "tools.show_data":
        if not behind:
            return  # it is only named
        own, words = show_data.own_parser().parse_known_args(behind)
        check_command(["python", f"{STAGES[own.stage].script}.py", *words])
        return
    parser = parsers().get(STARTED_BY.get(script, script))
    assert parser, f"no such script: {shlex.join(words)}"
    unknown = set(asked) - flags_of(parser)
    assert not unknown, f"{script} has no {', '.join(sorted(unknown))}: {shlex.join(words)}"
    if {"…", "--help"} & set(behind) or script in STARTED_BY or behind[:1] == ["run.yaml"]:
        return  # flags are left out, or come from elsewhere
    if isinstance(parser, list):
        flags = flags_by_name(parser)
        values = {name: flags[name].value(words) for name, words in given_on(behind, flags) if name in flags}
        assert not [name for name, flag in flags.items() if flag.required and name not in values]
        return
    with mock.patch.object(argparse.ArgumentParser, "error", _fail):
        parser.parse_args(behind)


def _fail(parser: argparse.ArgumentParser, message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_of_the_documents_are_commands(name):
    for language, content in code_blocks(read(name)):
        if language == "bash":
            for words in commands(content):
                check_command(words)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_the_middle_of_a_line_are_commands(name):
    for code in re.findall(r"`((?:python|bash|torchrun) [^`]+)`", re.sub(r"\s*\n\s*", " ", prose(read(name)))):
        words = shlex.split(code)
        if len(words) == 3 and words[1] == "-m" and words[2] != "tools.name":  # it is only named
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), code
        elif code != "python -m tools.name":
            check_command(words)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_flags_that_its_script_has(name):
    found = 0
    for launched in re.findall(r"^launch (\w+)\.py((?: \\\n.*)+)", read(name), re.MULTILINE):
        asked = set(re.findall(r"--\w+", launched[1]))
        found += 1
        assert asked <= flags_of(parsers()[launched[0]]), f"{launched[0]}.py has no {asked}"
        assert STARTED_BY[name] == launched[0]
    assert found == (1 if name in STARTED_BY else 0)


@pytest.mark.parametrize("name", RECIPES)
def test_commands_in_a_recipes_comments_are_commands(name):
    command = r"^#\s+(?:Then: )?((?:[A-Z_]+=\S+ )*(?:bash|python) .+?)(?:  +.*)?$"
    for line in re.findall(command, read(name), re.MULTILINE):
        words = shlex.split(line)
        if target(words)[0] != "run_tests.sh":
            check_command(words)


def test_settings_of_the_pipeline_are_flags():
    text = read("run_pipeline.sh")
    settings = dict(re.findall(r"^([A-Z]+)=\((--.+)\)$", text, re.MULTILINE))
    assert settings.keys() == {"EVERY", "PT", "SFT", "RM", "PPO", "DPO"}
    for stage in ("pt", "sft", "rm", "ppo", "dpo"):
        asked = set(re.findall(r"--\w+", f"{settings['EVERY']} {settings[stage.upper()]}"))
        unknown = asked - flags_of(parsers()[STARTED_BY[f"run_{stage}.sh"]])
        assert not unknown, f"run_pipeline.sh, {stage}: {unknown}"


@pytest.mark.parametrize("script", [*STARTED_BY.values(), "merge_peft_adapter", "convert_dataset", "inference"])
def test_commands_of_a_scripts_docstring_are_commands(script):
    docstring = importlib.import_module(script).__doc__
    blocks = re.findall(r"^    \S.*(?:\n {8}.*)*", docstring, re.MULTILINE)
    assert blocks, f"{script}.py: its docstring starts with no command"
    for block in blocks:
        for words in commands(re.sub(r"\s*\\?\n\s*", " ", block)):
            check_command(words)


def test_a_wrong_command_is_found():
    for wrong in (
        "python pretraining.py --model_name_or_path m --no_such_flag 1",
        "python supervised_finetuning.py --block_size 5",
        "bash run_sft.sh --beta 1",
        "torchrun --nproc 2 --no_such pretraining.py …",
        "python no_such_script.py",
        "python pretraining.py --output_dir x",  # --model_name_or_path is missing
        "python pretraining.py --model_name_or_path m --block_size many",
    ):
        with pytest.raises((AssertionError, ArgumentError)):
            check_command(shlex.split(wrong))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_is_named_exists(name):
    known = torchrun_flags() | earlier_flags() | {"--nproc_per_node"}
    known = known.union(*(flags_of(parser) for parser in [*parsers().values(), show_data.own_parser()]))
    text = prose(read(name))
    if "/from_" in name:  # the first column has another project's flags
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    # what the page on arguments shows as a mistake
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) - {"--learning_rat"} - OTHERS
    assert named <= known, f"{name}: no script has {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples_in_json_and_yaml_are_valid(name):
    for language, content in code_blocks(read(name)):
        if language == "yaml":
            loaded = yaml.safe_load(content)
            if isinstance(loaded, list):  # sources of --train_file_dir
                assert all(entry.keys() <= set(sources.KEYS) for entry in loaded)
                continue
            flags = {f"--{flag}" for flag in loaded}
            assert flags <= flags_of(parsers()["supervised_finetuning"])
        if language == "json" and name.startswith("docs/output"):
            json.loads(content)
        elif language == "json":
            assert [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("name", ["docs/data.md", "docs/data_zh.md"])
def test_example_records_are_read_as_the_page_says(name):
    from stagewise.formats.parsers import parse_conversation, parse_preference, parse_text

    blocks = [content for language, content in code_blocks(read(name)) if language == "json"]
    records = [json.loads(line) for content in blocks for line in content.splitlines()]
    text, sharegpt, openai, instruction, question, *preferences = records
    assert parse_text(text, "example").startswith("A vinaigrette")
    assert [message.role for message in parse_conversation(sharegpt, "example").messages] == ["user", "assistant"] * 2
    assert parse_conversation(openai, "example").system == "You are a patient cook."
    assert len(parse_conversation(instruction, "example").messages) == 4
    assert parse_conversation(question, "example").system == "You are a patient cook."
    assert len(preferences) == 4
    for preference in preferences:
        found = parse_preference(preference, "example")
        assert [found.chosen[0].content, found.rejected[0].content] == ["Add water, then taste.", "Who cares."]


@pytest.mark.parametrize("name", ["docs/data.md", "docs/data_zh.md"])
def test_roles_and_reasons_on_the_page_are_the_parsers(name):
    from stagewise.formats.parsers import ROLES

    rows = re.findall(r"^\| (user|assistant|tool_call|observation) \| (.+) \|$", read(name), re.MULTILINE)
    assert len(rows) == 4
    for role, others in rows:
        # OpenAI's field tool_calls is no role
        named = {word.strip() for word in re.split("[,、;;]", others) if "OpenAI" not in word}
        assert named | {role} == {alias for alias, meant in ROLES.items() if meant == role} | {role}


def test_the_error_on_the_page_on_data_is_the_parsers():
    from stagewise.data.bad_records import with_those_behind
    from stagewise.errors import RecordError
    from stagewise.formats.parsers import parse_conversation

    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("human", "d")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    with pytest.raises(RecordError) as error:
        parse_conversation(record, "english.jsonl:17")
    behind = [RecordError("?", reason, "…") for reason in (*[error.value.reason] * 2, "another")] + [None] * 80
    with_those_behind(error.value, behind)
    for name in ("docs/data.md", "docs/data_zh.md"):
        assert f"error: {error.value}\n" in read(name)


def test_keys_of_the_example_manifest_are_written_by_the_code():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "stagewise").rglob("*.py"))
    sources += read("supervised_finetuning.py")
    for language, content in code_blocks(read("docs/output.md")):
        if language == "json":
            manifest = json.loads(content)
            for key in [*manifest, *manifest["metrics"], *manifest["data"]["train"]]:
                assert re.search(rf'"{key}"|\b{key}\b[=:]', sources), key


@pytest.mark.parametrize("script", ["convert_dataset"])
@pytest.mark.parametrize("name", ["docs/data.md", "docs/data_zh.md"])
def test_the_flags_of_convert_dataset_are_documented(name, script):
    text = read(name)
    for flag in flags_of(parsers()[script]) - {"-h", "--help"}:
        assert flag in text


@pytest.mark.parametrize("name", ["docs/arguments.md", "docs/arguments_zh.md"])
def test_the_variables_of_the_recipes_are_documented(name):
    header = re.findall(r"^#   ((?:[A-Z_]+ )+)(?:=1)? ", read("launch.sh").replace("=1 ", "  "), re.MULTILINE)
    variables = {variable for names in header for variable in names.split()}
    assert {"MODEL", "NPROC", "NODE_RANK", "LAUNCH_DRY"} <= variables
    assert all(f"`{variable}`" in read(name) for variable in variables)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "language"), [("docs/arguments.md", "en"), ("docs/arguments_zh.md", "zh")])
def test_the_tables_of_flags_are_what_the_code_says(name, language):
    from tools.document_flags import written

    text = read(name)
    assert written(text, language) == text, "run: python -m tools.document_flags"


def test_the_tables_of_the_other_pages_are_what_the_code_and_the_benchmarks_say():
    from tools.document_flags import documents

    names = set()
    for path, renew in documents():
        text = read(str(path))
        assert renew(text) == text, f"{path}: run: python -m tools.document_flags"
        names.add(path.name)
    stages = {"pt.md", "sft_zh.md", "rm.md", "ppo.md", "dpo_zh.md", "memory_settings.md"}
    assert stages | {"inference_zh.md", "evaluation.md", "evaluation_zh.md", "web_demo.md", "web_demo_zh.md"} <= names


@pytest.mark.parametrize("script", ["inference", "evaluation", "web_demo"])
def test_a_page_has_every_flag_of_its_script(script):
    from tools.document_flags import page_of

    for language in ("en", "zh"):
        text = read(str(page_of(script, language)))
        for name in flags_by_name(parsers()[script]):
            assert text.count(f"| `--{name}` |") == 1, f"{page_of(script, language)}: --{name}"


@pytest.mark.parametrize(
    ("script", "own", "shared"),
    [
        ("pretraining", "block_size", "lora_rank"),
        ("supervised_finetuning", "mask_history", "packing"),
        ("dpo_training", "beta", "max_source_length"),
        ("ppo_training", "cliprange", "learning_rate"),
    ],
)
def test_a_stages_page_lists_its_own_flags_and_links_to_the_others(script, own, shared):
    from tools.document_flags import page_of

    for language in ("en", "zh"):
        text = read(str(page_of(script, language)))
        assert text.count(f"| `--{own}` |") == 1
        assert f"| `--{shared}` |" not in text
        assert re.search(r"\]\(arguments(_zh)?\.md#[^)]+\)", text)


def test_a_stages_page_without_its_place_is_an_error():
    from tools.document_flags import FlagsError, memory_page, stage_page

    text = read("docs/sft.md")
    with pytest.raises(
        FlagsError, match="docs/sft.md: expected one table marked '<!-- flags of supervised_finetuning"
    ):
        stage_page(text.replace("<!-- flags of supervised_finetuning -->", ""), "supervised_finetuning", "en")
    changed = text.replace("| `--truncation_side` | `right` |", "| `--truncation_side` | `left` |")
    assert changed != text
    assert stage_page(changed, "supervised_finetuning", "en") == text
    with pytest.raises(FlagsError, match="expected one place"):
        memory_page("nothing")


def test_every_flag_of_ours_is_in_the_tables():
    from transformers import TrainingArguments

    import tools.document_flags as tables

    text = read("docs/arguments.md")
    theirs = set(TrainingArguments.__dataclass_fields__)
    for script in (*BY_SCRIPT, tables.MERGE):
        for name in flags_by_name(parsers()[script]).keys() - theirs:
            assert f"| `--{name}` |" in text, f"{script}: --{name}"


def test_translations_without_a_text_are_found():
    from stagewise.config.command_line import ALWAYS_SO, NOT_YET
    from tools.document_flags import USERS, flags_of, groups, own_fields
    from tools.flag_texts import CHINESE

    kinds = [*(kind for kind, _ in groups().values()), *(kind for script in USERS for kind in flags_of(script))]
    texts = {field.metadata["help"] for kind in kinds for field in own_fields(kind)}
    assert not set(CHINESE) - texts - set(ALWAYS_SO.values()) - set(NOT_YET.values())


def test_a_document_without_a_table_is_an_error():
    from tools.document_flags import FlagsError, written

    text = read("docs/arguments.md")
    with pytest.raises(FlagsError, match="expected one table marked '<!-- flags ModelArguments -->', found 0"):
        written(text.replace("<!-- flags ModelArguments -->", ""), "en")
    changed = text.replace("| `--beta` | `0.1` |", "| `--beta` | `0.2` |")
    assert changed != text
    assert written(changed, "en") == text


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    text = prose(read(name))
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"
    for code in re.findall(r"`([\w./-]+\.(?:py|sh|md|json|jsonl|yaml|csv|txt))`", text):
        if code not in MADE and not code.startswith(("outputs/", "eval_records/", "step-0")) and "*" not in code:
            places = (ROOT / code, (ROOT / name).parent / code, ROOT / "stagewise" / code)
            assert any(place.exists() for place in places) or [*ROOT.glob(f"data/*/*/{code}")], f"{name}: {code}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_within_a_page_lead_somewhere(name):
    text = read(name)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in headings(text, "title")}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, f"{name}: #{anchor}"


def test_data_folders_of_the_commands_exist():
    for name in ENGLISH:
        for folder in re.findall(r"\bdata/\w+/\w+", read(name)):
            assert (ROOT / folder).exists(), f"{name}: {folder}"


# --- two languages ---------------------------------------------------------------------------------------------------


def headings(text: str, what: str) -> list[str]:
    """The headings' levels ("##") or titles, in order; comments in code are none."""
    found = re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)
    return [level if what == "level" else title for level, title in found]


def uncommented(code: str) -> list[str]:
    """Lines without comments and without what only explains: `# …`, and behind two spaces."""
    lines = [re.sub(r"(^|\s+)#( |:).*$", "", line) for line in code.splitlines()]
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_sections(english, chinese):
    assert headings(read(english), "level") == headings(read(chinese), "level")


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_code(english, chinese):
    blocks = [code_blocks(read(name)) for name in (english, chinese)]
    assert [language for language, _ in blocks[0]] == [language for language, _ in blocks[1]]
    for (language, first), (_, second) in zip(*blocks, strict=True):
        if language == "text":  # a tree whose right side is in words
            first, second = (re.sub(r"(?m)(\S)(?:  +|: ?|:).*$", r"\1", code) for code in (first, second))
        assert uncommented(first) == uncommented(second)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_name_the_same_flags_and_files(english, chinese):
    code = r"`(--\w+|[\w./-]+\.(?:py|sh|json|jsonl))`"
    assert set(re.findall(code, prose(read(english)))) == set(re.findall(code, prose(read(chinese))))


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 220


# --- words -----------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "an absolute path of one machine": r"(?<![\w.~-])/(?:work|root|home|Users|mnt)/\w|/tmp/[l]ead\b",
    "a package index": r"pypi\.org|python[h]osted|--?index[-_]url|mirrors?\.\w+\.\w+|tuna\.tsinghua",
    "how it is made": r"issues [s]how|(?i:[c]laude\b|[a]nthropic|\bissue #?\d)|this [s]ession"
    r"|\b(?:[m]ission|[a]rchitecture|[s]tyle)\.md\b",
}
NOT_OURS = {"models", "outputs", "runs", "__pycache__"}
TEXT = {".py", ".md", ".sh", ".txt", ".toml", ".json", ".jsonl", ".yml", ".yaml", ".ipynb", ".css", ""}


def own_files() -> list[Path]:
    """Every text file of the project; folders that start with a dot hold other people's, all but `.ci`."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and (name == ".ci" or name[0] != ".")]
        # in a worktree `.git` is a file, whose one line is a path
        found += [Path(folder, name) for name in names if Path(name).suffix in TEXT and name != ".git"]
    return sorted(found)


@pytest.mark.parametrize(
    ("what", "text"),  # with a dot in the middle, so that this file does not hold what is looked for
    [
        ("an absolute path of one machine", "see /wo·rk/main"),
        ("an absolute path of one machine", "`/ho·me/someone/data`"),
        ("a package index", "pip install --index·-url x"),
        ("a package index", "https://py·pi.org/simple"),
        ("an absolute path of one machine", "see /tmp/le·ad/x"),
        ("how it is made", "as issue ·12 says"),
        ("how it is made", "as miss·ion.md wants"),
    ],
)
def test_what_is_forbidden_would_be_found(what, text):
    assert re.search(FORBIDDEN[what], text.replace("·", ""))
    assert not re.search(
        FORBIDDEN[what], "data/work/x and tools/root, pip install -r requirements.txt, an issue of taste"
    )


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_repository_does_not_speak_of(what):
    files = own_files()
    assert {"README.md", "run", "english.jsonl", "launch.sh"} <= {path.name for path in files}
    for path in files:
        text = path.read_text(encoding="utf-8")
        found = re.search(FORBIDDEN[what], text)
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r} is {what}"
