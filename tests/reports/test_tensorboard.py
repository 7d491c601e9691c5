"""What TensorBoard is given, read back from its files."""

import json
import re
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from stagewise.reports.tensorboard import ALWAYS, Board, as_text, tag_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "learning/loss/train"),
        ("eval_loss", "learning/loss/validation"),
        ("eval_accuracy", "learning/accuracy/validation"),
        ("accuracy", "learning/accuracy/train"),
        ("learning_rate", "optimizer/learning_rate"),
        ("grad_norm", "optimizer/grad_norm"),
        ("kl_coef", "optimizer/kl_coef"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("memory_gib", "speed/memory_gib"),
        ("eval_runtime", "speed/evaluation_seconds"),
        ("eval_samples_per_second", None),
        ("eval_steps_per_second", None),
        ("train_runtime", None),
        ("total_flos", None),
    ],
)
def test_names_keep_together_what_belongs_together(name, expected):
    assert tag_of(name) == expected


def test_a_sample_is_shown_as_it_is():
    sample = {
        "where": "a.jsonl:3",
        "prompt": "<script>alert(1)</script>\n# no heading",
        "texts": [{"label": "answer", "text": "one\n\n* two", "score": 0.25}],
    }
    assert as_text(sample) == (
        "`a.jsonl:3`\n\n**prompt**\n\n    <script>alert(1)</script>\n    # no heading\n\n"
        "**answer (0.25)**\n\n    one\n    \n    * two"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import sys

    import supervised_finetuning
    from tests.conftest import build_tiny_model, build_tiny_tokenizer

    folder = tmp_path_factory.mktemp("board")
    build_tiny_model("llama").save_pretrained(folder / "base")
    build_tiny_tokenizer().save_pretrained(folder / "base")
    words = ["--model_name_or_path", folder / "base", "--output_dir", folder / "out", "--max_steps", 4]
    words += ["--train_file_dir", "data/finetune/train", "--validation_file_dir", "data/finetune/validation"]
    words += ["--max_train_samples", 8, "--max_eval_samples", 4, "--model_max_length", 512, "--logging_steps", 2]
    words += ["--eval_strategy", "steps", "--eval_steps", 2, "--learning_rate", 0.003, "--lora_rank", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["supervised_finetuning.py", *map(str, words)])
        supervised_finetuning.main()
    return folder / "out"


@pytest.fixture(scope="module")
def written(run):
    (path,) = (run / "logs").glob("events*")  # one file, no folder of its own for the hyperparameters
    assert [p.name for p in (run / "logs").iterdir()] == [path.name]
    events = EventAccumulator(str(path), size_guidance={"tensors": 0})
    events.Reload()
    return events


def test_scalars_are_those_of_the_log(run, written):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    for tag, name in (
        ("learning/loss/train", "loss"),
        ("learning/loss/validation", "eval_loss"),
        ("optimizer/learning_rate", "learning_rate"),
        ("speed/tokens_per_second", "tokens_per_second"),
    ):
        found = {(event.step, event.value) for event in written.Scalars(tag)}
        expected = {(log["step"], log[name]) for log in history if name in log}
        assert {s for s, _ in found} == {s for s, _ in expected}
        assert sorted(v for _, v in found) == pytest.approx(sorted(v for _, v in expected), rel=1e-5)
    groups = {tag.split("/")[0] for tag in written.Tags()["scalars"]}
    assert groups == {"learning", "optimizer", "speed"}


def test_samples_of_every_evaluation_are_texts(run, written):
    for number in (1, 2, 3):
        events = written.Tensors(f"samples/{number}/text_summary")
        assert [event.step for event in events] == [2, 4], "the last step's evaluation is made once"
        shown = events[-1].tensor_proto.string_val[0].decode()
        sample = json.loads((run / "eval_samples" / "step-4.jsonl").read_text().splitlines()[number - 1])
        assert sample["prompt"].split("\n")[0] in shown and shown.startswith(f"`{sample['where']}`")


def test_hyperparameters_and_the_metrics_to_compare_by(written):
    def content(tag):
        metadata = written.SummaryMetadata(f"_hparams_/{tag}")
        return plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)

    given = content("session_start_info").session_start_info.hparams
    assert given["stage"].string_value == "sft" and given["learning_rate"].number_value == 0.003
    assert given["lora_rank"].number_value == 4 and given["max_steps"].number_value == 4
    assert "output_dir" not in given
    named = {info.name.tag for info in content("experiment").experiment.metric_infos}
    assert {"learning/loss/train", "learning/loss/validation"} <= named
    # only what the run has measured is there as a number; no metric was written as 0
    assert "learning/accuracy/validation" not in written.Tags()["scalars"]


def test_what_was_written_beyond_the_checkpoint_is_not_shown_after_a_resumption(tmp_path):
    args = SimpleNamespace(logging_dir=str(tmp_path), to_json_string=lambda: "{}", **dict.fromkeys(ALWAYS, 1))
    for checkpoint, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        board = Board({"command": ["x.py"], "stage": "sft", "flags": {}})
        state = SimpleNamespace(is_world_process_zero=True, global_step=checkpoint)
        board.on_train_begin(args, state, None)
        for state.global_step in steps:
            board.on_log(args, state, None, logs={"loss": 10.0 * checkpoint + state.global_step})
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("learning/loss/train")] == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_an_evaluation_alone_has_the_same_names(stage, tiny_checkpoint, tmp_path):
    words = ["--model_name_or_path", tiny_checkpoint("llama"), "--output_dir", tmp_path / "out", "--do_eval"]
    stage(
        "supervised_finetuning", *words, "--validation_file_dir", "data/finetune/validation", "--max_eval_samples", 4
    )
    events = EventAccumulator(str(tmp_path / "out" / "logs"), size_guidance={"tensors": 0})
    events.Reload()
    assert "learning/loss/validation" in events.Tags()["scalars"] and "eval/loss" not in events.Tags()["scalars"]
    assert "samples/1/text_summary" in events.Tags()["tensors"]


def test_no_access_token_is_written(run):
    assert not any(re.search(rb"hf_hub_token\W+hf_", path.read_bytes()) for path in (run / "logs").iterdir())
