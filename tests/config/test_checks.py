"""Flags that do not fit together, checked without a command line."""

from dataclasses import dataclass

import pytest

from stagewise.config.arguments import AdapterArguments, DataArguments, LanguageModelArguments, ModelArguments
from stagewise.config.checks import check_shared
from stagewise.errors import ArgumentError


@dataclass
class Limit:
    """Stands for a stage's own flags."""

    model_max_length: int


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (ModelArguments("m", torch_dtype="fp8"), "--torch_dtype: expected one of"),
        (DataArguments(train_file_dir="a", dataset_name="b"), "--train_file_dir and --dataset_name"),
        (DataArguments(train_file_dir="a", dataset_config_name="b"), "--dataset_config_name needs"),
        (
            DataArguments(train_file_dir="a", validation_split_percentage=0),
            "--validation_split_percentage: expected 1",
        ),
        (
            DataArguments(train_file_dir="a", validation_file_dir="b", validation_split_percentage=5),
            "--validation_split_percentage has no effect",
        ),
        (DataArguments(train_file_dir="a", max_train_samples=0), "--max_train_samples: expected -1"),
        (DataArguments(train_file_dir="a", on_bad_record="ignore"), "--on_bad_record: expected one of"),
        (AdapterArguments(fine_tuning_type="ia3"), "--fine_tuning_type: expected one of full, lora, adalora"),
        (AdapterArguments(use_peft=False, lora_rank=16), "--lora_rank belongs to an adapter"),
        (AdapterArguments(use_peft=False, peft_path="x"), "--peft_path has no effect"),
        (AdapterArguments(lora_rank=0), "--lora_rank: expected at least 1"),
        (LanguageModelArguments(neft_alpha=-3), "--neft_alpha: expected 0 .no noise. or more, found -3"),
        (LanguageModelArguments(neft_alpha=float("nan")), "--neft_alpha: expected 0 .no noise. or more, found nan"),
        (Limit(model_max_length=0), "--model_max_length: expected at least 1, found 0"),
    ],
)
def test_flags_that_do_not_fit_are_named(part, message):
    with pytest.raises(ArgumentError, match=message):
        check_shared(part)
