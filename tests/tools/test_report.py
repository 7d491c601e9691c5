"""The report of a pipeline run: what holds and what fails, by numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from tools import judging, report
from tools.judging import Line


def rows(**columns):
    """Columns of equal length -> rows of english.jsonl:1, :2 …"""
    names = list(columns)
    values = zip(*columns.values(), strict=True)
    return {f"english.jsonl:{i}": dict(zip(names, row, strict=True)) for i, row in enumerate(values, 1)}


# --- differences -----------------------------------------------------------------------------------------------------


def test_mean_difference():
    # Differences 1, 2, 3, 4: mean 2.5, sum of squares about it 5, error sqrt(5 / 3 / 4).
    difference, error = judging.mean_difference(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]))
    assert difference == pytest.approx(2.5)
    assert error == pytest.approx(0.6454972)


def test_weighted_difference():
    # Sums fall by 2 of 10 and 1 of 30 tokens: -3 / 40. Off that rate by -1.25 and +1.25: sqrt(2 * 3.125) / 40.
    difference, error = judging.weighted_difference(np.array([10, 20]), np.array([8, 19]), np.array([10, 30]))
    assert difference == pytest.approx(-0.075)
    assert error == pytest.approx(0.0625)


def test_weighted_difference_with_equal_weights_is_the_mean_difference():
    before, after = np.array([1.0, 5.0, 2.0]), np.array([4.0, 6.0, 4.0])
    assert judging.weighted_difference(before, after, np.ones(3)) == pytest.approx(
        judging.mean_difference(before, after)
    )


def test_records_are_paired_by_place_whatever_their_order():
    before = {"a:1": {"x": 1.0}, "a:2": {"x": 2.0}}
    after = {"a:2": {"x": 20.0}, "a:1": {"x": 10.0}}
    ((was, now),) = judging.columns(before, after, "x")
    assert was.tolist() == [1.0, 2.0]
    assert now.tolist() == [10.0, 20.0]


def test_other_records_after_than_before_are_an_error():
    with pytest.raises(ValueError, match="different records, a:2 among them"):
        judging.columns({"a:1": {"x": 1.0}}, {"a:1": {"x": 1.0}, "a:2": {"x": 1.0}}, "x")


def test_languages_are_told_by_file_name():
    found = {"english.jsonl:1": {}, "english_more.jsonl:1": {}, "chinese.jsonl:1": {}, "english/chinese.jsonl:2": {}}
    assert list(judging.in_language(found, "english")) == ["english.jsonl:1", "english_more.jsonl:1"]
    assert list(judging.in_language(found, "chinese")) == ["chinese.jsonl:1", "english/chinese.jsonl:2"]


# --- stages ----------------------------------------------------------------------------------------------------------


def test_perplexity_falls():
    tokens = [10.0, 30.0]
    line = judging.language_model(
        "PT",
        rows(nll=[t * math.log(8) for t in tokens], tokens=tokens),
        rows(nll=[t * math.log(4) for t in tokens], tokens=tokens),
    )
    assert (line.before, line.after) == pytest.approx((8.0, 4.0))
    assert line.difference == pytest.approx(-0.6931472)
    assert line.error == pytest.approx(0.0, abs=1e-9)
    assert line.holds


@pytest.mark.parametrize(
    ("after", "holds"),
    [
        ((8.0, 19.0), False),  # -0.075 with error 0.0625: not beyond two errors
        ((8.0, 14.5), True),  # -0.1875, off by -0.125 and +0.125: error 0.00625
        ((12.0, 25.5), False),  # a rise
    ],
)
def test_perplexity_must_fall_by_more_than_two_errors(after, holds):
    tokens = (10.0, 30.0)
    line = judging.language_model("SFT", rows(nll=(10.0, 20.0), tokens=tokens), rows(nll=after, tokens=tokens))
    assert line.holds is holds


def preferences(right, count):
    """`count` pairs of which the first `right` are in the right order by a margin of 1."""
    return rows(chosen=[1.0 if i < right else 0.0 for i in range(count)], rejected=[0.5] * count)


@pytest.mark.parametrize(("right", "count", "holds"), [(56, 80, True), (55, 80, False), (79, 79, False)])
def test_reward_model_s_accuracy(right, count, holds):
    line = judging.reward_model(preferences(count // 2, count), preferences(right, count), 0.5, 0.9)[0]
    assert line.after == pytest.approx(right / count)
    assert line.before == pytest.approx((count // 2) / count)
    assert line.holds is holds


def test_reward_model_s_difference_is_paired():
    # Two of four pairs right before, three after, of which one is another pair: differences 0, -1, 1, 1.
    before, after = rows(chosen=[2, 2, 0, 0], rejected=[1] * 4), rows(chosen=[2, 0, 2, 2], rejected=[1] * 4)
    line = judging.reward_model(before, after, 0.5, 0.9)[0]
    assert line.difference == pytest.approx(0.25)
    assert line.error == pytest.approx(math.sqrt((0.0625 + 1.5625 + 2 * 0.5625) / 3 / 4))


@pytest.mark.parametrize(("share", "holds"), [(0.39, False), (0.40, True), (0.60, True), (0.61, False)])
def test_length_alone_must_tell_nothing(share, holds):
    lines = judging.reward_model(preferences(40, 80), preferences(60, 80), share, 0.9)
    assert lines[1].after == share
    assert lines[1].holds is holds
    assert (lines[2].after, lines[2].holds) == (0.9, None)


def rollouts(score=0.0, kl=0.0, length=50.0, nll=100.0, ended=1.0, repetition=0.1):
    """Four answers; `score` is spread by ±0.1 so that its difference has an error."""
    spread = np.array([-0.1, 0.1, 0.1, -0.1])
    columns = {"score": score + spread * (score != 0)}
    for name, value in {"kl": kl, "length": length, "nll": nll, "ended": ended, "repetition": repetition}.items():
        columns[name] = np.full(4, value)
    return rows(**columns)


@pytest.mark.parametrize(
    ("after", "failing"),
    [
        ({"score": 1.0, "kl": 5.0, "length": 60.0, "nll": 126.0}, []),
        # Error of the difference: 0.1 / sqrt(3) = 0.0577.
        ({"score": 0.12}, []),
        ({"score": 0.11}, ["mean reward on 4 prompts"]),
        ({"score": -1.0}, ["mean reward on 4 prompts"]),
        ({"score": 1.0, "kl": 10.0}, ["KL to the SFT model, nats per response"]),
        ({"score": 1.0, "length": 66.0, "nll": 132.0}, ["length, tokens per response"]),
        ({"score": 1.0, "length": 34.0, "nll": 68.0}, ["length, tokens per response"]),
        # exp(100 / 50) -> exp(110 / 50): a factor of exp(0.2) = 1.22.
        ({"score": 1.0, "nll": 110.0}, ["perplexity of its answers under the SFT model"]),
        ({"score": 1.0, "nll": 109.0}, []),  # exp(0.18) = 1.197
    ],
)
def test_ppo(after, failing):
    lines = judging.ppo(rollouts(), rollouts(**after))
    assert [line.metric for line in lines if line.holds is False] == failing
    assert [line.holds for line in lines[4:]] == [None, None]
    assert lines[3].before == pytest.approx(math.exp(2))


def test_dpo_accuracy_and_margin_rise():
    # At the start both rewards are 0: a tie counts one half, the margin is 0.
    before = rows(chosen=[0.0] * 4, rejected=[0.0] * 4)
    after = rows(chosen=[0.5, 0.4, 0.3, 0.6], rejected=[0.1, 0.2, 0.1, 0.0])
    accuracy, margin = judging.dpo(before, after)
    assert (accuracy.before, accuracy.after, accuracy.error) == (0.5, 1.0, 0.0)
    assert accuracy.holds
    # Margins 0.4, 0.2, 0.2, 0.6: mean 0.35, squares about it 0.11, error sqrt(0.11 / 12).
    assert (margin.before, margin.after) == pytest.approx((0.0, 0.35))
    assert margin.error == pytest.approx(0.0957427)
    assert margin.holds


def test_dpo_fails_where_nothing_moved():
    still = rows(chosen=[0.0] * 4, rejected=[0.0] * 4)
    assert [line.holds for line in judging.dpo(still, still)] == [False, False]


# --- without a model -------------------------------------------------------------------------------------------------


def test_length_alone():
    assert judging.length_alone([("aaa", "bb"), ("a", "bb"), ("aa", "bb")]) == 0.5
    assert judging.length_alone([("aaa", "bb"), ("aaaa", "bb")]) == 1.0


def test_words_of_both_languages():
    assert judging.words("Don’t wait: CALL 112! 多喝水。") == ["don't", "wait", "call", "多", "喝", "水"]


def test_bag_of_words_learns_which_words_are_preferred():
    training = [("rest well", "run fast"), ("rest now", "run now"), ("run home", "rest home")]  # rest: 2 of 3
    assert judging.bag_of_words(training, [("rest", "run")]) == 1.0
    assert judging.bag_of_words(training, [("run", "rest")]) == 0.0
    assert judging.bag_of_words(training, [("unknown", "never seen")]) == 0.5
    assert judging.bag_of_words(training, [("rest", "run"), ("run", "rest"), ("x", "y")]) == 0.5


def test_bag_of_words_counts_words():
    assert judging.bag_of_words([("water", "wine")], [("wine water water", "water wine wine")]) == 1.0


# --- the command -----------------------------------------------------------------------------------------------------


def test_blocks_of_one_document_are_added_up(tmp_path):
    lines = [{"where": "a.txt:1", "nll": 2.0, "tokens": 4.0}, {"where": "a.txt:1", "nll": 1.0, "tokens": 3.0}]
    (tmp_path / "step-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert report.read_rows(tmp_path / "step-0.jsonl") == {"a.txt:1": {"nll": 3.0, "tokens": 7.0}}


def test_table_marks_what_fails_and_gives_a_stage_s_minutes_once():
    text = report.table(
        [
            Line("RM", "accuracy", 0.5, 0.75, 0.25, 0.05, True, "at least 0.70"),
            Line("RM", "length", None, 0.7, holds=False),
        ],
        {"RM": 2.0},
    )
    assert text.splitlines()[2:] == [
        "| RM | accuracy | 0.500 | 0.750 | +0.250 | 0.050 | 2.0 | at least 0.70 | holds |",
        "|  | length |  | 0.700 |  |  |  |  | **FAILS** |",
    ]


LANGUAGES = {"english": 84, "chinese": 4}


def evaluation(stage, learned):
    """Rows of one evaluation of a stage before (learned 0) or after (1) training, in both languages."""
    made = []
    for language, count in LANGUAGES.items():
        for i in range(1, count + 1):
            wave = 0.01 * (i % 3)
            row = {
                "pt": {"nll": 40.0 - 4 * learned + wave, "tokens": 20.0},
                "sft": {"nll": 40.0 - 4 * learned + wave, "tokens": 20.0},
                "rm": {"chosen": learned * (1 + wave), "rejected": 0.0},
                "dpo": {"chosen": learned * (1 + wave), "rejected": 0.0},
                "ppo": {
                    "score": learned * (1 + wave),
                    "kl": 2.0 * learned,
                    "length": 50.0,
                    "nll": 100.0,
                    "ended": 1.0,
                    "repetition": 0.0,
                },
            }[stage]
            made.append({"where": f"{language}.jsonl:{i}", **row})
    return made


@pytest.fixture
def outputs(tmp_path, tiny_checkpoint, tiny_tokenizer):
    """A pipeline's output directories, with tiny random models for the merged ones."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    data = "data"
    flags = {
        "sft": {"validation_file_dir": f"{data}/finetune/validation"},
        "rm": {"train_file_dir": f"{data}/reward/train", "validation_file_dir": f"{data}/reward/validation"},
    }
    base = tiny_checkpoint("llama")  # without a chat template, as base models are
    for stage in report.STAGES:
        folder = tmp_path / stage
        (folder / "eval_records").mkdir(parents=True)
        run = {
            "status": "finished",
            "steps": 10,
            "flags": flags.get(stage, {}),
            "base_model": str(base),
            "device": "cpu (2 cores)",
            "seconds": 90.0,
            "versions": {"torch": "2", "transformers": "5", "peft": "0"},
        }
        (folder / "run.json").write_text(json.dumps(run))
        history = [
            {"step": 1, "loss": 2.0, "reward": 0.0},
            {"step": 8, "loss": 1.0, "reward": 1.0},
            {"step": 8, "eval_loss": 1.5},
        ]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        for step, learned in ((0, 0), (2, 0.5), (10, 1), (30, -1)):  # the last from an earlier, longer run
            lines = map(json.dumps, evaluation(stage, learned))
            (folder / "eval_records" / f"step-{step}.jsonl").write_text("\n".join(lines))
    for stage in report.TALKERS:
        made = tiny_checkpoint("llama", seed=len(stage), tokenizer=tiny_tokenizer(chat_template=template))
        (tmp_path / f"{stage}-merged").symlink_to(made)
    return tmp_path


def run(outputs, monkeypatch):
    monkeypatch.chdir(report.Path(__file__).resolve().parents[2])
    with pytest.raises(SystemExit) as ended:
        report.main(["--outputs", str(outputs), "--max_new_tokens", "4"])
    return ended.value.code


def test_a_run_that_learned_passes(outputs, monkeypatch, capsys):
    (outputs / "seconds.tsv").write_text("started\t0\npt\t120\n")
    # Chinese records that got worse are shown and not judged.
    path = outputs / "pt" / "eval_records" / "step-10.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["nll"] += 100 * record["where"].startswith("chinese")
    path.write_text("\n".join(map(json.dumps, records)))

    assert run(outputs, monkeypatch) == 0
    text = (outputs / "report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "Every line holds." in text
    # exp(40.01 / 20) and exp(36.01 / 20); i % 3 is 0, 1, 2 equally often, so that the mean nll is 40.01.
    assert "| PT | perplexity (difference: nats per token) | 7.393 | 6.053 | -0.200 | 0.000 | 2.0 |" in text
    assert "| PT | perplexity (difference: nats per token) | 7.393 | 898" in text.split("## Chinese")[1]
    assert "| RM | accuracy on 84 pairs | 0.500 | 1.000 | +0.500 | 0.000 | 1.5 |" in text
    assert "implicit-reward margin | 0.000 | 1.010 |" in text
    assert text.count("- *base*: ") == text.count("- *SFT*: ") == text.count("- *PPO*: ") == 3
    assert (outputs / "curves.png").stat().st_size > 5000


def test_a_stage_that_did_not_learn_fails(outputs, monkeypatch):
    for stage in ("rm", "dpo"):
        records = outputs / stage / "eval_records"
        (records / "step-10.jsonl").write_text((records / "step-0.jsonl").read_text())
    assert run(outputs, monkeypatch) == 1
    text = (outputs / "report.md").read_text()
    verdict = next(line for line in text.splitlines() if "of the lines below fail" in line)
    assert verdict.endswith(
        "**3 of the lines below fail**: RM accuracy on 84 pairs; DPO implicit-reward accuracy on 84 pairs; "
        "DPO implicit-reward margin."
    )
    assert text.count("**FAILS**") == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: (o / "rm" / "run.json").unlink(), "run the stage first: bash run_rm.sh"),
        (lambda o: (o / "rm" / "run.json").write_text('{"status": "failed"}'), "status is 'failed'"),
        (lambda o: (o / "pt" / "eval_records" / "step-0.jsonl").unlink(), "--eval_on_start --save_eval_records"),
        (lambda o: (o / "dpo-merged").unlink(), "python merge_peft_adapter.py --lora_model"),
    ],
)
def test_what_is_missing_is_named(outputs, monkeypatch, capsys, spoil, message):
    spoil(outputs)
    assert run(outputs, monkeypatch) == 2
    assert message in capsys.readouterr().err
