"""The flags of transformers' TrainingArguments, read from its source without importing it.

The import takes seconds because of torch, but `--help` and a mistyped flag should answer at once. A test compares
names, types, defaults and help texts with the class itself.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal

SOURCE = "training_args.py"

# The most used ones, described in our words.
MOST_USED: dict[str, str] = {
    "do_train": "Train. With neither this nor --do_eval: train, and evaluate if there are validation records.",
    "do_eval": "Evaluate. Alone, without --do_train: evaluate the model as it is, and stop.",
    "per_device_train_batch_size": "Rows per process and forward pass in training; RM and DPO: pairs.",
    "per_device_eval_batch_size": "Rows per process and forward pass in evaluation, where rows are never packed.",
    "gradient_accumulation_steps": "Batches that make one optimizer step.",
    "num_train_epochs": "Passes over the training records.",
    "max_steps": "Optimizer steps, in place of epochs; -1: epochs count.",
    "learning_rate": "Highest learning rate.",
    "lr_scheduler_type": "How it falls: linear, cosine, constant …",
    "warmup_steps": "Steps over which it rises; below 1: that share of all steps.",
    "weight_decay": "Weight decay of AdamW.",
    "max_grad_norm": "Gradients are scaled down to this norm; 0: never.",
    "optim": "Optimizer.",
    "bf16": "Compute in bfloat16 (mixed precision); also on a CPU.",
    "fp16": "Compute in float16; needs a GPU.",
    "gradient_checkpointing": "Less memory for activations, more time.",
    "eval_strategy": "When to evaluate during training: no, steps, epoch.",
    "eval_steps": "Every so many steps; below 1: a share of all steps; default: as --logging_steps.",
    "eval_on_start": "Evaluate before the first step too.",
    "save_strategy": "When to save a checkpoint: no, steps, epoch, best.",
    "save_steps": "Every so many steps; below 1: a share of all steps.",
    "load_best_model_at_end": "End with the best checkpoint in place of the last step.",
    "metric_for_best_model": "What best means, e.g. eval_loss or eval_accuracy.",
    "resume_from_checkpoint": "True: continue from the last complete checkpoint; or a checkpoint's folder.",
    "seed": "Seed of everything random.",
    "data_seed": "Seed of the order of the training rows; default: --seed.",
    "use_cpu": "Run on the CPU though there is a GPU.",
    "deepspeed": "DeepSpeed's configuration: zero2.json or zero3.json.",
    "ddp_timeout": "Seconds after which processes stop waiting for each other.",
    "dataloader_num_workers": "Processes that put batches together.",
    "train_sampling_strategy": "Order of the training rows: random, sequential, or group_by_length (like lengths "
    "together).",
    "run_name": "Name of the run in a tracker.",
}


@cache
def training_arguments(folder: Path | None = None) -> type | None:
    """A dataclass with the fields of TrainingArguments; None if the source cannot be parsed this way.

    `folder` is transformers' package folder; default: that of the installed one.
    """
    if folder is None:
        spec = importlib.util.find_spec("transformers")
        if spec is None or not spec.origin:
            return None
        folder = Path(spec.origin).parent
    try:
        tree = _parsed(folder / SOURCE)
        body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments").body
        return _dataclass(body, _Names(folder, tree))
    except (OSError, SyntaxError, StopIteration, TypeError, ValueError):
        return None


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _dataclass(body: list[ast.stmt], names: _Names) -> type:
    fields = []
    for statement in body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                names[ast.unparse(target)] = _evaluated(statement.value, names)
        elif isinstance(statement, ast.If):  # a default that depends on the torch version: that of the newer one
            found = [n for n in ast.walk(statement) if isinstance(n, ast.Assign)]
            names.update({ast.unparse(n.targets[0]): _evaluated(n.value, names) for n in found})
        elif isinstance(statement, ast.AnnAssign):
            fields.append(_field(statement, names))
    return dataclasses.make_dataclass("TrainingArguments", fields)


def _field(statement: ast.AnnAssign, names: _Names) -> tuple[str, Any, dataclasses.Field]:
    options = {word.arg: word.value for word in statement.value.keywords}
    metadata = {}
    if isinstance(
        found := options.get("metadata"), ast.Dict
    ):  # evaluated one by one: some are only known after an import
        pairs = zip(found.keys, found.values, strict=True)
        metadata = {_evaluated(key, names): _evaluated(value, names) for key, value in pairs}
    if "default_factory" in options:  # a lambda or a class: a list, if there is one
        field = dataclasses.field(default_factory=list, metadata=metadata)
    else:
        default = _evaluated(options["default"], names) if "default" in options else None
        field = dataclasses.field(default=default, metadata=metadata)
    return ast.unparse(statement.target), _evaluated(statement.annotation, names), field


def _evaluated(node: ast.expr, names: _Names) -> Any:
    """The value of a default or a type; None for one that only the running library knows."""
    try:
        return eval(compile(ast.Expression(node), SOURCE, "eval"), {"__builtins__": {}}, names)
    except (NameError, LookupError, TypeError, AttributeError, ValueError):
        return None


class _Names(dict):
    """The names that an expression of the source may use: built-in types, and enums that it imports or declares."""

    def __init__(self, folder: Path, tree: ast.Module):
        super().__init__(Any=Any, Literal=Literal, **{t.__name__: t for t in (bool, int, float, str, list, dict)})
        self.folder, self.tree = folder, tree

    def __missing__(self, name: str) -> Any:
        tree = self.tree
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and name in [alias.name for alias in node.names]:
                path = self.folder / f"{(node.module or '').replace('.', '/')}.py"
                if path.is_file():
                    tree = _parsed(path)
        found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
        if found is None:
            raise KeyError(name)
        members = [(ast.unparse(n.targets[0]), n.value.value) for n in found.body
                   if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]  # fmt: skip
        self[name] = enum.Enum(name, members, type=str) if members else type(name, (), {})
        return self[name]
