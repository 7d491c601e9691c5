import pytest
from transformers.trainer_utils import IntervalStrategy

from stagewise.config.arguments import DataArguments
from stagewise.errors import ArgumentError
from stagewise.training.settings import StageArguments, device_flags, is_yes, settle_what_to_do


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], False),
        ([("fp16", [])], True),
        ([("fp16", []), ("bf16", [])], True),
        ([("fp16", ["True"])], True),
        ([("fp16", ["1"])], True),
        ([("fp16", ["0"])], False),
        ([("fp16", ["no"])], False),
        ([("fp16", ["off"])], False),
        ([("fp16", ["FALSE"]), ("bf16", [])], False),
        ([("fp16", []), ("seed", ["1"]), ("fp16", ["False"])], False),
    ],
)
def test_a_flag_says_yes_or_no(given, expected):
    assert is_yes(given, "fp16") is expected


def test_flags_of_a_gpu_that_say_no_are_no_hindrance_on_a_cpu():
    given = [("fp16", ["0"]), ("use_liger_kernel", ["False"]), ("use_cpu", ["True"])]
    assert device_flags(given) == given
    for flag in ("fp16", "use_liger_kernel"):
        with pytest.raises(ArgumentError, match=f"--{flag}: needs a GPU"):
            device_flags([("use_cpu", []), (flag, ["yes"])])


def test_a_cpu_is_not_asked_for_by_saying_no(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    given = [("use_cpu", ["False"]), ("fp16", [])]
    assert device_flags(given) == given


def settled(tmp_path, **flags):
    args = StageArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)
    settle_what_to_do(
        args,
        DataArguments("train", validation_file_dir="validation"),
        [(name, [str(value)]) for name, value in flags.items()],
    )
    return args.do_train, args.do_eval


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (True, True)),
        ({"do_train": True}, (True, False)),
        ({"do_eval": True}, (False, True)),
        ({"do_train": True, "do_eval": True}, (True, True)),
        ({"do_eval": False}, (True, False)),
        ({"do_train": False}, (False, True)),
        ({"do_train": False, "do_eval": True}, (False, True)),
        ({"do_train": False, "do_eval": True, "eval_strategy": IntervalStrategy.STEPS}, (False, True)),
        ({"do_train": False, "eval_strategy": IntervalStrategy.STEPS}, (False, True)),
        ({"eval_strategy": IntervalStrategy.STEPS}, (True, True)),
    ],
)
def test_what_is_done_is_what_is_said(tmp_path, flags, expected):
    assert settled(tmp_path, **flags) == expected


def test_nothing_to_do_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="nothing is left to do"):
        settled(tmp_path, do_train=False, do_eval=False)


@pytest.mark.parametrize("asks", [{"eval_strategy": "steps"}, {"eval_on_start": True}])
def test_no_evaluation_and_evaluation_contradict_each_other(tmp_path, asks):
    args = StageArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", do_eval=False, **asks)
    data = DataArguments("train", validation_file_dir="validation")
    with pytest.raises(ArgumentError, match="--do_eval False contradicts --eval_strategy and --eval_on_start"):
        settle_what_to_do(args, data, [("do_eval", ["False"])])
