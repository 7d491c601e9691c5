"""The identity of a run, saved in each checkpoint as `belongs.json`; a run that resumes has to have the same.

Other step sizes are allowed (see position.py). Anything else that would change the order of the rows, or their
meaning, is an error that names the flag and both values, before any weights are read if possible.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from peft import PeftConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from stagewise.adapters.files import METHOD_OF, read_adapter_config
from stagewise.adapters.targets import names_of
from stagewise.artifacts.json_files import read_object
from stagewise.artifacts.processes import on_every_process
from stagewise.chat.encoding import AnyTemplate
from stagewise.config.arguments import AdapterArguments, ModelArguments
from stagewise.errors import ArgumentError, FileError
from stagewise.training.resume.fingerprints import model_fingerprint, records_fingerprint, text_fingerprint

RECORD = "belongs.json"
# Flags that determine the order of rows, and their meaning to the model.
SAME = (
    *("seed", "data_seed", "streaming", "packing", "train_sampling_strategy", "dataloader_drop_last"),
    *("model_max_length", "block_size", "max_source_length", "max_target_length", "truncation_side"),
    *("train_on_inputs", "mask_history", "enable_thinking", "rope_scaling", "rope_factor", "reward_label"),
    *("ppo_epochs", "encoder_hidden_size", "loraplus_lr_ratio"),
)
TARGETS = ("target_modules", "modules_to_save")  # the same, except for an adapter of --peft_path, which has its own
# Flags that select and encode records: changed records are detected by fingerprint, these explain the change.
CHOOSE = (
    *("max_train_samples", "validation_split_percentage", "deduplicate", "data_weights", "on_bad_record"),
    *("tokenizer_name_or_path", "dataset_name", "dataset_config_name", "train_file_dir"),
)
MODELS = ("model_name_or_path", "checkpoint_dir", "reward_model_name_or_path", "ref_model_name_or_path")
DEALT = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")  # of --accelerator_config
# Fields of adapter_config.json that determine the adapter's shape -> the flag.
SHAPE = {
    **{"r": "lora_rank", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"},
    **{"init_r": "init_r", "target_r": "target_r"},
    **{"num_virtual_tokens": "num_virtual_tokens", "prefix_projection": "prefix_projection"},
}


class Identity:
    """The identity of a run: compared with the checkpoint that it resumes from, and saved in its own checkpoints.

    Args:
        stage: "pt", "sft", "rm", "dpo" or "ppo".
        args: the Trainer's arguments.
        parts: the stage's dataclasses.
        checkpoint: the one to resume from, or None.
    """

    def __init__(self, stage: str, args: TrainingArguments, parts: Sequence[Any], checkpoint: Path | None = None):
        self.stage, self.args, self.parts, self.checkpoint = stage, args, [args, *parts], checkpoint
        self.then = read_record(checkpoint) if checkpoint else None
        self.model_args = next((part for part in parts if isinstance(part, ModelArguments)), None)
        self.adapter = next((part for part in parts if isinstance(part, AdapterArguments)), AdapterArguments())
        self.now: dict[str, Any] = {"stage": stage}

    # ── before anything is read ──────────────────────────────────────────────────────────────────────────────────

    def check_flags(self) -> None:
        """Compares the flags with the checkpoint's.

        Raises:
            ArgumentError: one of them must not change.
        """
        targets = () if self.adapter.peft_path or not self.adapter.trains_adapter else TARGETS
        named = [name for name in (*SAME, *targets) if any(hasattr(part, name) for part in self.parts)]
        self.now |= {
            "flags": {name: self._flag(name) for name in named},
            "chosen_by": {name: self._flag(name) for name in CHOOSE},
            "dealt": {name: getattr(self.args.accelerator_config, name) for name in DEALT},
            "optimizer": optimizer_kind(self.args),
            "deepspeed": zero_stage(self.args),
            "processes": self.args.world_size,
        }
        if self.now["flags"]["data_seed"] is None:
            self.now["flags"]["data_seed"] = self.args.seed
        if self.checkpoint is None:
            return
        if self.then is None:
            logger.info(
                f"{self.checkpoint} has no {RECORD} (an earlier version made it): data, base model and flags are not "
                "compared with those of this run"
            )
        elif self.then["stage"] != self.stage:
            raise ArgumentError(
                f"--resume_from_checkpoint {self.checkpoint}: made by the stage {self.then['stage']}, and this is "
                f"{self.stage}; give another --output_dir"
            )
        self._check_shape()
        if self.then is not None:
            self._check_same()

    def _check_shape(self) -> None:
        """Compares the shape in the adapter's own config, also for a checkpoint without a record."""
        has_adapter = (self.checkpoint / "adapter_config.json").is_file()
        config = read_adapter_config(self.checkpoint) if has_adapter else None
        was = METHOD_OF.get(config.peft_type.value, config.peft_type.value) if config else "full"
        self._compare("--fine_tuning_type", was, self.adapter.method)
        if config is None:
            return
        own = read_adapter_config(self.adapter.peft_path) if self.adapter.peft_path else self.adapter
        for name, flag in SHAPE.items():
            if hasattr(config, name) and (name != "r" or was == "lora"):  # AdaLoRA's r has no meaning
                now = getattr(own, name if isinstance(own, PeftConfig) else flag)
                self._compare(f"--{flag}", getattr(config, name), now)
        if was == "lora":
            starts = ("pissa" if str(c.init_lora_weights).startswith("pissa") else "default" for c in (config, own))
            self._compare("--init_lora_weights", *starts)

    def _check_same(self) -> None:
        then, now = self.then, self.now
        for name in now["flags"]:
            if name in then["flags"]:
                self._compare(f"--{name}", then["flags"][name], now["flags"][name])
        self._compare("--accelerator_config", then["dealt"], now["dealt"])
        if not now["dealt"]["use_seedable_sampler"]:
            self._refuse("--accelerator_config", "use_seedable_sampler false, whose order is never the same", "it")
        self._compare("--optim", then["optimizer"], now["optimizer"])
        self._compare("--deepspeed", then["deepspeed"], now["deepspeed"])
        if now["deepspeed"]:  # each process holds a shard of the optimizer's state, which cannot be redistributed
            self._compare("--deepspeed with a number of processes of", then["processes"], now["processes"])

    # ── before the weights are read ──────────────────────────────────────────────────────────────────────────────

    def check_data(self, examples: Any, template: AnyTemplate | None) -> None:
        """Compares template, records and models with the checkpoint's, on every process.

        Args:
            examples: the encoded training records, or their stream.
            template: the chat template; None in PT.

        Raises:
            ArgumentError: they differ.
        """
        text = template and text_fingerprint(template.jinja())
        count = len(examples) if hasattr(examples, "__len__") else None
        self.now |= {
            "template": {"name": template and template.name, "fingerprint": text},
            "data": {"records": count, "fingerprint": records_fingerprint(examples)},
            "rollout": self._rollout(),
            "models": {
                flag: {"name": str(name), "weights": model_fingerprint(name, self.model_args, flag)}
                for flag in MODELS
                if (name := self._flag(flag))
            },
        }
        if self.then is not None:
            on_every_process(self._check_data)

    def _rollout(self) -> dict[str, int]:
        """PPO: the sizes by which prompts and updates are distributed, over all processes."""
        if self._flag("ppo_epochs") is None:
            return {}
        processes = self.args.world_size
        return {
            "--batch_size × processes": self._flag("batch_size") * processes,
            "--mini_batch_size × processes": self._flag("mini_batch_size") * processes,
            "--gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }

    def _check_data(self) -> None:
        then, now = self.then, self.now
        if then["template"] != now["template"]:
            was, name = then["template"]["name"], now["template"]["name"]
            self._refuse("--template_name", was, name if name != was else f"{name} with another text")
        for name, value in now["rollout"].items():
            self._compare(name, then["rollout"].get(name), value)
        if then["data"] != now["data"]:
            name = next((n for n in CHOOSE if then["chosen_by"].get(n) != now["chosen_by"][n]), "train_file_dir")
            was, found = (part["data"]["records"] for part in (then, now))
            found = f"{found} records" if was != found else "others, or these in another order"
            self._refuse(
                f"--{name}", f"{was} records" if was else "other files", f"{now['chosen_by'][name]} ({found})"
            )
        self._check_models()

    def _check_models(self) -> None:
        for flag in MODELS:
            was, now = (part["models"].get(flag) for part in (self.then, self.now))
            if was is None or now is None:
                self._compare(f"--{flag}", was and was["name"], now and now["name"])
            elif was["weights"] and now["weights"] and was["weights"] != now["weights"]:
                name = now["name"] if now["name"] != was["name"] else f"{now['name']} with other weights"
                self._refuse(f"--{flag}", was["name"], name)

    # ── before the first step ────────────────────────────────────────────────────────────────────────────────────

    def check_trainer(self, trainer: Trainer) -> None:
        """Compares what is known once the model is loaded: the adapter's modules, the rows, a hub's weights.

        Raises:
            ArgumentError: they differ.
        """
        for flag, model in self.now["models"].items():
            if model["weights"] is None:  # they have been downloaded in the meantime
                model["weights"] = model_fingerprint(model["name"], self.model_args, flag)
        if self.checkpoint is None:
            return
        config = getattr(trainer.model, "peft_config", {}).get("default")
        if config is not None:
            saved = read_adapter_config(self.checkpoint)
            for name in (*TARGETS, "target_parameters"):
                was, now = (", ".join(sorted(set(names_of(getattr(part, name, None))))) for part in (saved, config))
                self._compare(f"--{name.replace('parameters', 'modules')}", was, now)
        if self.then is None:
            return
        on_every_process(self._check_models)
        was, now = (place.get("rows_per_epoch") for place in (self.then["place"], trainer.place()))
        self._compare("the number of rows of an epoch", was, now)

    def record(self, trainer: Trainer) -> dict[str, Any]:
        """The identity to save in a checkpoint."""
        return {**self.now, "place": trainer.place()}

    # ── words ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _flag(self, name: str) -> Any:
        value = next((value for part in self.parts if (value := getattr(part, name, None)) is not None), None)
        return value.value if isinstance(value, enum.Enum) else value

    def _compare(self, what: str, then: Any, now: Any) -> None:
        if then != now:
            self._refuse(what, then, now)

    def _refuse(self, what: str, then: Any, now: Any) -> None:
        refuse(self.checkpoint, what, then, now)


def refuse(checkpoint: Path, what: str, then: Any, now: Any) -> None:
    """Raises ArgumentError: a resumed run must have the same `what` as `then`."""
    then, now = ("none" if value is None or value == "" else value for value in (then, now))
    flag = "--peft_path" if (checkpoint / "adapter_config.json").is_file() else "--model_name_or_path"
    raise ArgumentError(
        f"{what} {now}: {checkpoint} was trained with {then}, and a resumed run keeps that. Give it as before, or "
        f"start a new run from these weights: {flag} {checkpoint} and another --output_dir"
    )


def optimizer_kind(args: TrainingArguments) -> str:
    """A common name for optimizers that read each other's states."""
    name = str(getattr(args.optim, "value", args.optim))
    return "adamw_torch" if name == "adamw_torch_fused" else name


def zero_stage(args: TrainingArguments) -> str | None:
    """DeepSpeed's ZeRO stage, or None without it."""
    return f"ZeRO-{args.deepspeed_plugin.zero_stage}" if args.deepspeed else None


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The identity saved in a checkpoint; None for one of an earlier version.

    Raises:
        FileError: the record is broken.
    """
    path = Path(checkpoint) / RECORD
    if not path.exists():
        return None
    way_out = "resume from an earlier checkpoint"
    record = read_object(path, way_out)
    for name in ("flags", "chosen_by", "dealt", "template", "data", "rollout", "models", "place"):
        if not isinstance(record.get(name), dict):
            raise FileError(f"{path}: expected an object at {name}; {way_out}")
    return record


class KeepsIdentity(TrainerCallback):
    """Saves the identity in each checkpoint. To be added before the callback that marks it complete."""

    def __init__(self, identity: Identity, trainer: Trainer):
        self.identity, self.trainer = identity, trainer

    def on_save(self, args, state, control, **kwargs):
        record = self.identity.record(self.trainer)
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
