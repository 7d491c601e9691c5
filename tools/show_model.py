r"""A model's structure, its parameters by kind, what a stage would train, and the memory it would need.

    python -m tools.show_model supervised_finetuning.py --model_name_or_path Qwen/Qwen2.5-1.5B --bf16 \
        --gradient_checkpointing --model_max_length 4096

The first argument is a stage's script, the others are its flags. Only config.json is read: the model is built without
weights. The memory is that of one process on one GPU; docs/memory.md has the formulas.
"""

from __future__ import annotations

import sys

from stagewise.config.stages import BY_SCRIPT, STAGES
from stagewise.errors import ArgumentError
from stagewise.training.first_look import first_look, print_error_once
from tools.stage_scripts import dataclasses_of, early_flags


def script_name(word: str) -> str:
    """ "pretraining" of "pretraining.py". Raises ArgumentError if it is not a stage's script."""
    name = word.removesuffix(".py")
    if name not in BY_SCRIPT:
        raise ArgumentError(f"expected a stage's script first, one of {', '.join(BY_SCRIPT)}; found {word!r}")
    return name


def look(words: list[str]) -> None:
    """Ends the program if its flags are wrong."""
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nstages: {', '.join(BY_SCRIPT)}")
        raise SystemExit(0)
    try:
        flags = early_flags(script_name(words[0]))
    except ArgumentError as error:
        print_error_once(str(error))
        raise SystemExit(2) from None
    given = [("output_dir", ["outputs"])]
    first_look(flags, None, stage=True, code=2, argv=words[1:], before=lambda found: [*given, *found], texts=())


if __name__ == "__main__":
    look(sys.argv[1:])  # a wrong flag or path is answered before torch has loaded

import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from loguru import logger
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from stagewise.adapters.attach import attach_adapter, read_adapter_config
from stagewise.adapters.compatibility import check_methods
from stagewise.config.arguments import VIRTUAL_TOKENS, AdapterArguments, ModelArguments
from stagewise.config.checks import check_shared
from stagewise.config.command_line import FALSE_WORDS, Given, parse
from stagewise.models.attention.choose import choose_attention
from stagewise.models.config import DTYPES, load_config
from stagewise.models.forward import takes_kept_logits
from stagewise.models.memory import estimate
from stagewise.models.memory import structure as layers
from stagewise.reports.terminal_text import log_visible_text, print_error, visible
from stagewise.training.settings import settle_long_context, settle_precision

# What a stage can do and the estimate cannot.
NOT_ESTIMATED = {
    "deepspeed": "the estimate is for a process that holds the whole model; leave it out",
    "fsdp": "the estimate is for a process that holds the whole model; leave it out",
    "use_liger_kernel": "its kernels keep other activations; leave it out",
    "device_map": "the estimate is for one GPU; leave it out",
}


@dataclass
class Described:
    """A stage's model according to its flags, without weights."""

    stage: str
    model: PreTrainedModel | PeftModel
    config: PretrainedConfig
    in_bits: set[int]  # ids of weights in 4 or 8 bit
    step: estimate.TrainingStep
    method: str


# ------------------------------------------------------------------------------------------------------------- flags


def flags_for_a_gpu(given: Given) -> Given:
    """The flags as on a GPU, even if there is none.

    Raises:
        ArgumentError: for flags whose effect is not estimated.
    """
    kept = []
    for name, words in given:
        off = bool(words) and words[0].lower() in FALSE_WORDS
        if name in NOT_ESTIMATED and not off:
            raise ArgumentError(f"--{name}: {NOT_ESTIMATED[name]}")
        # the same memory; torch refuses --fp16 without a GPU
        kept.append(("bf16", []) if name == "fp16" and not off else (name, words))
    names = dict(kept)
    if "output_dir" not in names:
        kept.append(("output_dir", ["outputs"]))  # nothing is written
    if not torch.accelerator.is_available() and "use_cpu" not in names:
        kept.append(("use_cpu", ["True"]))
    return kept


def read_flags(script: str, words: list[str]) -> tuple[str, Any, list[Any]]:
    """A stage's flags, parsed and checked like in the stage: (stage, TrainingArguments, other dataclasses).

    Raises:
        ArgumentError: with the flag.
    """
    name, given = script_name(script), []

    def before(flags: Given) -> Given:
        given.extend(flags)
        return flags_for_a_gpu(flags)

    args, *parts = parse(dataclasses_of(name), words, before=before)
    for part in parts:
        if isinstance(part, AdapterArguments):
            part.given = frozenset(name for name, _ in given)
    check_shared(*parts)
    settle_precision(args, parts)
    gpu = {"device": torch.device("cuda"), "optim": args.optim, "max_steps": args.max_steps, "deepspeed": None}
    stage = BY_SCRIPT[name].name
    check_methods(stage, SimpleNamespace(**gpu, gradient_checkpointing=args.gradient_checkpointing), parts)
    settle_long_context(stage, parts)
    return stage, args, parts


def flag(parts: list[Any], name: str, default: Any = None) -> Any:
    """The value of a flag, whichever dataclass has it."""
    return next((getattr(part, name) for part in parts if hasattr(part, name)), default)


def step_of(stage: str, args: Any, parts: list[Any], kept_logits: bool) -> estimate.TrainingStep:
    """The contents of a training step, assuming that every position has a label and every row is full."""
    model = next(part for part in parts if isinstance(part, ModelArguments))
    batch = args.per_device_train_batch_size
    if capacity := STAGES[stage].capacity_flag:
        rows, tokens = batch, flag(parts, capacity)
        logit_tokens = rows * tokens
    else:
        answer = flag(parts, "max_target_length")
        rows, tokens = 2 * batch, flag(parts, "max_source_length") + answer
        # chosen and rejected answer of a pair begin at one position, those of other pairs elsewhere
        logit_tokens = 0 if stage == "rm" else rows * (min(tokens, batch * answer) if kept_logits else tokens)
    adapter = next(part for part in parts if isinstance(part, AdapterArguments))
    virtual = adapter.num_virtual_tokens if adapter.method in VIRTUAL_TOKENS else 0
    packed = bool(capacity) and flag(parts, "packing", False) and not (virtual or model.shift_attn)
    # torch's own attention takes several documents in a row, or padding, as a mask; a batch of one has no padding
    masked = not (model.flash_attn or model.shift_attn) and (packed or rows > 1)
    return estimate.TrainingStep(
        rows=rows,
        tokens=tokens + virtual,
        logit_tokens=logit_tokens,
        autocast=bool(args.bf16 or args.fp16),
        mask_width=(rows * tokens if packed else tokens + virtual) if masked else 0,
        checkpointing=bool(args.gradient_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        optim=str(getattr(args.optim, "value", args.optim)),
        bits=model.bits,
        double_quantization=model.qlora,
        experts_in_bits=bool(model.bits == 4 and flag(parts, "quantize_experts", False)),
        reference=stage == "dpo" and not adapter.trains_adapter,
    )


# ------------------------------------------------------------------------------------------------------------- model


def describe(script: str, words: list[str]) -> Described:
    """Builds the stage's model without weights, with its adapter.

    Raises:
        ArgumentError: (or a subclass) with the flag.
    """
    stage, args, parts = read_flags(script, words)
    model_args = next(part for part in parts if isinstance(part, ModelArguments))
    adapter = next(part for part in parts if isinstance(part, AdapterArguments))
    config = load_config(model_args)
    auto = AutoModelForCausalLM
    if stage == "rm":
        auto, config = AutoModelForSequenceClassification, config.get_text_config()
        config.num_labels = 1
    if model_args.shift_attn:  # also says what else trains
        config._attn_implementation = choose_attention(config, model_args)
    model = layers.skeleton(config, auto, dtype_of(model_args, config), model_args.trust_remote_code)
    in_bits = estimate.layers_in_bits(model) if model_args.bits else set()
    step = step_of(stage, args, parts, takes_kept_logits(model))
    if step.experts_in_bits:
        in_bits |= {id(p) for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name}
    if adapter.trains_adapter:
        task = "SEQ_CLS" if stage == "rm" else "CAUSAL_LM"
        if adapter.peft_path:
            known = read_adapter_config(adapter.peft_path)
            known.inference_mode = False
            model = get_peft_model(model, known)
        else:
            # PiSSA decomposes weights, of which there are none; its shapes are LoRA's
            model = attach_adapter(model, replace_start(adapter), task)
    return Described(stage, model, config, in_bits, step, adapter.fine_tuning_type if adapter.use_peft else "full")


def replace_start(adapter: AdapterArguments) -> AdapterArguments:
    changed = replace(adapter, init_lora_weights="default")
    changed.given = adapter.given
    return changed


def dtype_of(args: ModelArguments, config: PretrainedConfig) -> torch.dtype:
    if args.torch_dtype != "auto":
        return DTYPES[args.torch_dtype]
    return getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32


# ---------------------------------------------------------------------------------------------------------- printing


def structure(found: list[layers.Parameter], prefix: str) -> list[str]:
    """One line for each kind of weight, with equal layers combined: `model.layers.*.mlp.up_proj.weight 64 × 32 ×2`.

    `prefix` is the one that PEFT adds to the names.
    """
    shapes: dict[tuple[str, tuple[int, ...], str, bool], int] = Counter()
    for p in found:
        shapes[re.sub(r"(?<=\.)\d+(?=\.)", "*", p.name.removeprefix(prefix)), p.shape, p.dtype, p.trained] += 1
    width = max(len(name) for name, *_ in shapes)
    return [
        f"{name:<{width}}  {' × '.join(map(str, shape)):<20} ×{count:<4} {dtype}{'  trained' if trained else ''}"
        for (name, shape, dtype, trained), count in shapes.items()
    ]


def kinds_table(found: list[layers.Parameter]) -> list[str]:
    total = sum(p.numel for p in found)
    lines = ["| kind | parameters | share | trained | precision |", "|---|---:|---:|---:|---|"]
    for kind in layers.KINDS:
        ours = [p for p in found if p.kind == kind]
        if ours:
            size, trained = sum(p.numel for p in ours), sum(p.numel for p in ours if p.trained)
            dtypes = ", ".join(sorted({p.dtype for p in ours}))
            lines.append(f"| {kind} | {size:,} | {size / total:.1%} | {trained:,} | {dtypes} |")
    trained = sum(p.numel for p in found if p.trained)
    lines.append(f"| all | {total:,} | 100.0% | {trained:,} ({trained / total:.2%}) | |")
    return lines


def memory_table(found: estimate.Memory) -> list[str]:
    lines = ["| memory | GiB |", "|---|---:|"]
    lines += [f"| {name} | {value / 2**30:.2f} |" for name, value in found.rows() if value]
    return [*lines, f"| peak, in {found.moment} | {found.peak / 2**30:.2f} |"]


def report(described: Described) -> str:
    """The full output of the program."""
    found = layers.parameters_of(described.model, described.in_bits, described.step.bits)
    base = described.model.get_base_model() if isinstance(described.model, PeftModel) else described.model
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    step = described.step
    bits = f", linear layers in {step.bits} bit" if step.bits else ""
    lines = [f"{type(base).__name__} ({described.config.model_type}), {described.method}{bits}", ""]
    adapted = isinstance(described.model, PeftModel)
    virtual = adapted and described.model.active_peft_config.is_prompt_learning
    lines += structure(found, "base_model." if virtual else "base_model.model." if adapted else "")
    lines += ["head and embedding are one weight" if tied else "", "", *kinds_table(found), ""]
    if described.stage == "ppo":
        return "\n".join(
            [*lines, "memory: not estimated for PPO, which also holds a reward model and what it generates"]
        )
    lines.append(
        f"one step: {step.rows} × {step.tokens} tokens, logits at {step.logit_tokens} positions, "
        f"{'an attention mask, ' if step.mask_width else ''}{'autocast to 16 bit, ' if step.autocast else ''}"
        f"{'with' if step.checkpointing else 'without'} gradient checkpointing, {step.optim}"
    )
    lines += ["", *memory_table(estimate.estimate(described.model, step, described.in_bits))]
    if described.config.model_type not in estimate.COMPARED:
        lines.append(
            f"\n{described.config.model_type}: its activations were never compared with a count; a rough figure"
        )
    lines += ["", "The CUDA context, about half a GiB, and what torch keeps in reserve come on top."]
    if step.optim in estimate.PAGED:
        lines.append("Paged states can leave the GPU; they are counted here as if they stayed.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    # renamings inside transformers, which a user can do nothing about
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logger.remove()
    log_visible_text()
    logger.add(lambda message: sys.stderr.write(message), level="INFO", format="{message}")
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nstages: {', '.join(BY_SCRIPT)}")
        return
    try:
        print(visible(report(describe(words[0], words[1:]))))
    except ValueError as error:
        if not isinstance(error, ArgumentError):
            raise
        print_error(error)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
