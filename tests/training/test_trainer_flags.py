import pytest

from stagewise.errors import ArgumentError
from stagewise.training.settings import StageArguments
from stagewise.training.trainer_flags import check_trainer_flags


def checked(tmp_path, **flags):
    args = StageArguments(output_dir=str(tmp_path), use_cpu=True, **{"report_to": "none", **flags})
    check_trainer_flags(args)
    return args


def test_the_defaults_are_followed(tmp_path):
    checked(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        {"save_total_limit": 0},
        {"max_steps": 5, "num_train_epochs": 0},
        {"save_strategy": "no", "save_steps": 0},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}, "max_steps": 9},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        {"optim": "adafactor"},
        {"report_to": "tensorboard"},
        {"report_to": "all"},
    ],
)
def test_what_can_be_followed_is(tmp_path, flags):
    checked(tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prediction_loss_only": True}, "--prediction_loss_only: validation is measured in one way"),
        ({"batch_eval_metrics": True}, "--batch_eval_metrics: "),
        ({"eval_do_concat_batches": False}, "--eval_do_concat_batches False: "),
        ({"eval_use_gather_object": True}, "--eval_use_gather_object: "),
        ({"include_for_metrics": ["inputs"]}, "--include_for_metrics: "),
        ({"label_names": ["labels"]}, "--label_names: batches hold what is needed"),
        ({"length_column_name": "size"}, "--length_column_name: "),
        ({"use_cache": True}, "--use_cache: "),
        ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint: SIGTERM always saves"),
        ({"fsdp": "full_shard"}, "--fsdp: not in this version. --deepspeed zero3.json"),
        ({"do_predict": True}, "--do_predict: "),
        ({"average_tokens_across_devices": False}, "--average_tokens_across_devices False: "),
        ({"train_sampling_strategy": "batch_rebalance"}, "--train_sampling_strategy batch_rebalance: "),
        ({"optim_target_modules": "q_proj"}, "--optim_target_modules has no effect on --optim adamw_torch_fused"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw: You need to install"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr: One of min_lr"),
        ({"lr_scheduler_kwargs": {"min": 1}}, "--lr_scheduler_type linear: .*unexpected keyword argument 'min'"),
        ({"report_to": "nonsense"}, "--report_to nonsense: expected none, all, or some of "),
        ({"report_to": "clearml"}, "--report_to clearml: is not installed: pip install clearml"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size: expected at least 1, found 0"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size: expected at least 1, found 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps: expected at least 1, found 0"),
        ({"learning_rate": -1.0}, "--learning_rate: expected at least 0, found -1.0"),
        ({"learning_rate": float("nan")}, "--learning_rate: expected at least 0, found nan"),
        ({"learning_rate": float("inf")}, "--learning_rate: expected a finite number"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm: "),
        ({"weight_decay": -0.1}, "--weight_decay: "),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers: "),
        ({"adam_beta1": 1.0}, "--adam_beta1: expected 0 to below 1"),
        ({"num_train_epochs": 0}, "--num_train_epochs: expected more than 0, found 0"),
        ({"max_steps": 0}, "--max_steps: expected at least 1, or -1"),
        ({"max_steps": -5}, "--max_steps: expected at least 1, or -1"),
        ({"save_steps": 0}, "--save_steps: expected more than 0"),
        ({"save_total_limit": -1}, "--save_total_limit: "),
        ({"seed": -1}, "--seed: expected 0 to 4294967295, found -1"),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path, flags, message):
    with pytest.raises(ArgumentError, match=message):
        checked(tmp_path, **flags)
