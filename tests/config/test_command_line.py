"""The strict parser: names of today and of earlier pipelines, files of flags, and what is refused."""

import json
from dataclasses import dataclass, field

import pytest

from stagewise.config.arguments import AdapterArguments, ChatArguments, LanguageModelArguments, ModelArguments
from stagewise.config.command_line import parse
from stagewise.errors import ArgumentError


@dataclass
class Trained:
    """Stands for transformers' TrainingArguments, without torch."""

    output_dir: str = "out"
    eval_strategy: str = "no"
    warmup_steps: float = 0
    use_cpu: bool = False
    optim: str = "adamw_torch_fused"
    train_sampling_strategy: str = "random"
    learning_rate: float = 5e-5
    neftune_noise_alpha: float | None = field(default=None)


@dataclass
class Several:
    """Flags that take several words."""

    compare_with: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=lambda: ["x"])


def read(*words, types=(Trained, ModelArguments)):
    return parse(list(types), ["--model_name_or_path", "m", *words])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--evaluation_strategy", "steps"], "eval_strategy", "steps"),
        (["--warmup_ratio", "0.05"], "warmup_steps", 0.05),
        (["--warmup_steps", "3", "--warmup_ratio", "0.0"], "warmup_steps", 3),
        (["--warmup_ratio", "0.1", "--warmup_steps", "3"], "warmup_steps", 3),
        (["--warmup_steps", "0", "--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--warmup_ratio", "0.1", "--warmup_steps", "0"], "warmup_steps", 0.1),
        (["--warmup_steps", "0.05", "--warmup_ratio", "0.1"], "warmup_steps", 0.1),  # behind a recipe's own
        (["--warmup_ratio", "0.1", "--warmup_steps", "0.05"], "warmup_steps", 0.05),
        (["--no_cuda"], "use_cpu", True),
        (["--no_cuda", "False"], "use_cpu", False),
        (["--optim", "adamw_hf"], "optim", "adamw_torch"),
        (["--group_by_length", "True"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length", "False"], "train_sampling_strategy", "random"),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--use_fast_tokenizer", "False"], "output_dir", "out"),
    ],
)
def test_names_of_earlier_pipelines_are_taken_as_meant(words, name, value):
    assert getattr(read(*words)[0], name) == value


def test_unknown_flag_ends_with_the_nearest_known_name():
    with pytest.raises(ArgumentError, match="--learning_rat: no such flag; the nearest known flag is --learning_rate"):
        read("--learning_rat", "1e-3")


def test_a_flag_of_other_stages_says_which():
    with pytest.raises(
        ArgumentError, match="--streaming: no such flag; only pretraining.py and supervised_finetuning"
    ):
        read("--streaming")
    with pytest.raises(ArgumentError, match="--template_name: no such flag; the stages that read conversations have"):
        read("--template_name", "vicuna")


@pytest.mark.parametrize(
    ("words", "value"), [((), None), (("--enable_thinking",), True), (("--enable_thinking", "False"), False)]
)
def test_a_flag_of_three_values_alone_is_true(words, value):
    assert read(*words, types=(Trained, ModelArguments, ChatArguments))[2].enable_thinking is value


def test_an_abbreviation_is_not_a_flag():
    with pytest.raises(ArgumentError, match="--output_dir"):
        read("--output", "x")


@pytest.mark.parametrize("flag", ["cpm_quantization_target"])
def test_flags_of_later_versions_are_refused_by_name(flag):
    with pytest.raises(ArgumentError, match=f"--{flag}: not in this version"):
        read(f"--{flag}", "True")


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--output_dir", "x", "-h"]])
def test_help_is_shown_by_either_name(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([Trained], words)
    assert ended.value.code == 0
    assert "--output_dir PATH" in capsys.readouterr().out


def test_value_without_flag_is_an_error():
    with pytest.raises(ArgumentError, match="starts with --, found 'sft'"):
        parse([Trained], ["sft", "--output_dir", "x"])


def test_file_of_flags_and_later_flags_that_override_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nlearning_rate: 1.0e-3\noutput_dir: a\nuse_cpu: true\noptim: null\n")
    trained, model = parse([Trained, ModelArguments], [str(path), "--output_dir", "b"])
    assert (trained.learning_rate, trained.output_dir, trained.use_cpu) == (1e-3, "b", True)
    assert (trained.optim, model.model_name_or_path) == ("adamw_torch_fused", "m")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"evaluation_strategy": "epoch", "model_name_or_path": "m"}))
    assert parse([Trained, ModelArguments], [str(path)])[0].eval_strategy == "epoch"


@pytest.mark.parametrize(
    ("in_file", "after", "steps"),
    [
        ("warmup_steps: 100", ["--warmup_ratio", "0.1"], 0.1),
        ("warmup_ratio: 0.1", ["--warmup_steps", "100"], 100),
        ("warmup_ratio: 0.1", ["--warmup_steps", "0"], 0),
        ("warmup_steps: 100\nwarmup_ratio: 0.1", [], 100),
        ("warmup_steps: 100", ["--warmup_ratio", "0.1", "--warmup_steps", "0"], 0.1),
    ],
)
def test_what_follows_a_file_overrides_it_also_by_another_name(in_file, after, steps, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(in_file)
    assert parse([Trained], [str(path), *after])[0].warmup_steps == steps


def test_a_list_in_a_file_of_flags_is_what_the_flag_takes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("compare-with: [a b, c]\nothers: []\ntarget_modules: [q_proj, v_proj]\n")
    several, adapter = parse([Several, AdapterArguments], [str(path)])
    assert (several.compare_with, several.others) == (["a b", "c"], ["x"])
    assert adapter.target_modules == "q_proj,v_proj"


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n"])
def test_bad_file_of_flags_names_the_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match="bad.yaml"):
        parse([Trained], [str(path)])


def test_missing_file_of_flags():
    with pytest.raises(ArgumentError, match="nowhere.yaml: no such file"):
        parse([Trained], ["nowhere.yaml"])


def test_neftune_noise_alpha_is_neft_alpha_where_the_stage_has_it():
    assert (
        read("--neftune_noise_alpha", "5", types=(Trained, ModelArguments, LanguageModelArguments))[2].neft_alpha == 5
    )
    assert read("--neftune_noise_alpha", "5")[0].neftune_noise_alpha == 5


def test_the_flags_pass_through_before():
    seen = []
    parse([Trained, ModelArguments], ["--model_name_or_path", "m", "--no_cuda"], before=lambda g: seen.extend(g) or g)
    assert seen == [("model_name_or_path", ["m"]), ("use_cpu", [])]
