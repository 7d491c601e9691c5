"""Folds an adapter into its base and writes a plain model directory, checked against base + adapter.

    python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged
    python merge_peft_adapter.py --base_model Qwen/Qwen3-0.6B --lora_model outputs/sft --output_dir outputs/sft-merged

The base is read tensor by tensor and written shard by shard (W + scale · B A in float32, cast back to the base's own
precision), so that one shard is in memory, never base and result. Where a base's files do not allow that, the model is
loaded and merged in place, and the log says why. Base + adapter and the merged model are then run in float32 on the
same prompts; above the printed tolerance nothing is left at --output_dir.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loguru import logger
from peft import PeftConfig, load_peft_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stagewise.adapter import fold, load_adapter
from stagewise.adapter_files import read_adapter_config, refuse_unmergeable
from stagewise.arguments import ArgumentError, ModelArguments, parse
from stagewise.lineage import LICENCE_FILES, UNKNOWN, find_licence
from stagewise.manifest import read_manifest
from stagewise.model_card import called, write_card
from stagewise.model_config import load_config
from stagewise.model_source import find_source, hub_options
from stagewise.quantisation import guard_4bit
from stagewise.rope import write_rope
from stagewise.run import set_up_logging
from stagewise.scalar_head import reward_config
from stagewise.shards import Plan, merge_shards, plan_shards, tied_names

PREFIX = "base_model.model."  # before every name in an adapter's file
TOLERANCE = 2e-4  # as a share of the largest logit, or absolute for scores below 1
PROMPTS = (
    "Drink enough water, sleep well, and ask a doctor",
    "多喝水,好好休息。",
    "def add(a, b):\n    return a + b\n",
)
ALONGSIDE = ("*.py", "preprocessor_config.json", "processor_config.json", "tokenizer.model", *LICENCE_FILES)


@dataclass
class MergeArguments:
    lora_model: str = field(metadata={"help": "The adapter's directory."})
    output_dir: str = field(metadata={"help": "Where the merged model is written."})
    base_model: str | None = field(default=None, metadata={"help": "Default: the base named in adapter_config.json."})
    tokenizer_path: str | None = field(default=None, metadata={"help": "Default: the adapter's, else the base's."})
    resize_emb: bool = field(default=False, metadata={"help": "Add rows to the embedding until the tokenizer fits."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is at --output_dir."})
    model_type: str = field(default="auto", metadata={"help": "Architecture you expect; checked against the config."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where a hub base is cached."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub base."})
    hf_hub_token: str | None = field(default=None, metadata={"help": "Token for a private hub base."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that the base ships."})


class MergeError(ArgumentError):
    """A merge that cannot be done or did not come out right; the message says what to do."""


@dataclass
class Job:
    """What is merged: everything that was found out before a weight of the base was read."""

    base: Path
    name: str  # of the base: its directory, or its name on the hub
    adapter: Path
    config: PeftConfig  # the adapter's
    base_config: PretrainedConfig  # with a reward head where the adapter has one
    auto: type
    skeleton: PreTrainedModel  # the model without weights
    weights: dict[str, torch.Tensor]  # the adapter's, without PREFIX
    tokenizer: PreTrainedTokenizerBase
    rows: int  # of the merged embedding
    options: dict[str, Any]  # for from_pretrained

    @property
    def scores(self) -> bool:
        return self.auto is AutoModelForSequenceClassification


# ── what is to be merged ────────────────────────────────────────────────────────────────────────────────────────────


def prepare(args: MergeArguments) -> Job:
    """Reads configs, tokenizer and adapter; refuses what cannot be merged before the base's weights are read."""
    adapter = Path(args.lora_model)
    config = read_adapter_config(adapter)
    refuse_unmergeable(config, adapter)
    if config.task_type not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise MergeError(f"--lora_model {adapter}: expected a CAUSAL_LM or SEQ_CLS adapter, found {config.task_type}")
    name = args.base_model or config.base_model_name_or_path
    if not name:
        raise MergeError(f"{adapter}/adapter_config.json names no base: give --base_model")
    if config.base_model_name_or_path not in (None, name):
        logger.info(f"base: {name} in place of {config.base_model_name_or_path}, which the adapter names")
    shared = {f: getattr(args, f) for f in ("model_type", "cache_dir", "model_revision", "hf_hub_token")}
    model_args = ModelArguments(name, trust_remote_code=args.trust_remote_code, **shared)
    model_args.model_name_or_path = base = fetch(find_source(name, model_args, "base_model"), model_args)
    check_predecessor(adapter, base)
    model_args.kept_rope = (read_manifest(adapter) or {}).get("rope")
    base_config = load_config(model_args)
    tokenizer = read_tokenizer(args, adapter, model_args)
    weights = {k.removeprefix(PREFIX): v for k, v in load_peft_weights(str(adapter), device="cpu").items()}
    auto = AutoModelForCausalLM
    if config.task_type == "SEQ_CLS":
        auto = AutoModelForSequenceClassification
        base_config = reward_config(base_config, tokenizer, base)
        base_config.num_labels = len(weights["score.weight"]) if "score.weight" in weights else 1
    with torch.device("meta"):
        skeleton = auto.from_config(copy.deepcopy(base_config), trust_remote_code=args.trust_remote_code)
    skeleton.tie_weights()
    trained = weights.get(tied_names(skeleton)[1])
    rows = skeleton.get_input_embeddings().weight.shape[0] if trained is None else len(trained)
    rows = grown(rows, tokenizer, args.resize_emb)
    options = hub_options(base, model_args)
    return Job(Path(base), name, adapter, config, base_config, auto, skeleton, weights, tokenizer, rows, options)


def check_predecessor(adapter: Path, base: str) -> None:
    """An adapter that was trained with --checkpoint_dir belongs on its model with that earlier adapter merged in.

    Raises:
        MergeError: `base` is not the result of that merge; says how to make it.
    """
    earlier = (read_manifest(adapter) or {}).get("lineage") or [{}]
    first = earlier[-1].get("merged_adapter")
    if first is None:
        return
    merged = (read_manifest(base) or {}).get("adapter")
    if merged is None or Path(merged).resolve() != Path(first).resolve():
        raise MergeError(
            f"--lora_model {adapter}: was trained on {earlier[-1]['base_model']} with {first} merged in. Merge that: "
            f"python merge_peft_adapter.py --base_model {earlier[-1]['base_model']} --lora_model {first} "
            "--output_dir MERGED; then give --base_model MERGED here"
        )


def fetch(source: str, args: ModelArguments) -> str:
    """A local directory as it is; a hub model's files are downloaded (safetensors, or .bin where there are none)."""
    if Path(source).is_dir():
        return source
    options = {"revision": args.model_revision, "token": args.hf_hub_token, "cache_dir": args.cache_dir}
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", *LICENCE_FILES]
    try:
        folder = snapshot_download(source, allow_patterns=wanted, **options)
        if not list(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(source, allow_patterns=[*wanted, "*.bin"], **options)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MergeError(f"--base_model {source}: no such directory, and no hub model was found: {error}") from error
    return folder


def read_tokenizer(args: MergeArguments, adapter: Path, base: ModelArguments) -> PreTrainedTokenizerBase:
    """--tokenizer_path, else the adapter's own, else the base's; its chat template comes along."""
    own = str(adapter) if (adapter / "tokenizer_config.json").is_file() else base.model_name_or_path
    source = find_source(args.tokenizer_path or own, base, "tokenizer_path")
    try:
        return AutoTokenizer.from_pretrained(source, **hub_options(source, base))
    except (OSError, ValueError) as error:
        raise MergeError(f"--tokenizer_path {source}: no tokenizer could be loaded: {error}") from error


def grown(rows: int, tokenizer: PreTrainedTokenizerBase, resize: bool) -> int:
    """The merged embedding's rows: as they are, or more where --resize_emb lets the tokenizer have them."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        if resize:
            logger.info(f"--resize_emb: nothing to add, the tokenizer needs {needed} rows and there are {rows}")
        return rows
    if not resize:
        raise MergeError(
            f"the tokenizer needs {needed} rows, the embedding has {rows}: add --resize_emb, or give the tokenizer of "
            "the base with --tokenizer_path"
        )
    logger.info(f"--resize_emb: {rows} rows become {needed}; the new ones are the mean of the old, not trained")
    return needed


# ── merging ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose_plan(job: Job) -> Plan | str:
    """How to merge shard by shard, or why it has to be in memory."""
    if job.rows != job.skeleton.get_input_embeddings().weight.shape[0]:
        return "the embedding has more rows than the base's"
    return plan_shards(job.base, job.skeleton, job.config, job.weights)


def quantisation(config: PretrainedConfig) -> str | None:
    """What a checkpoint was quantised by, None for plain weights."""
    about = getattr(config, "quantization_config", None)
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    return None if about is None else str(getattr(method, "value", method))


def load_base(job: Job, dtype: torch.dtype | str) -> PreTrainedModel:
    """The base with the merged embedding's rows; a 4- or 8-bit base comes back in float32."""
    method = quantisation(job.base_config)
    if method and method != "bitsandbytes":
        raise MergeError(f"--base_model {job.base}: quantised, and not by bitsandbytes; give its 16-bit original")
    if method and importlib.util.find_spec("bitsandbytes") is None:
        raise MergeError(
            f"--base_model {job.base}: quantised by bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or give the 16-bit original, which an adapter is better merged into"
        )
    model = job.auto.from_pretrained(job.base, config=job.base_config, dtype=dtype, **job.options)
    guard_4bit(model)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=torch.float32)
    old = model.get_input_embeddings().weight.shape[0]
    if job.rows != old:
        model.resize_token_embeddings(job.rows, mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight.data[old:] = module.weight.data[:old].float().mean(dim=0).to(module.weight.dtype)
    if job.scores:
        model.score.float()  # kept as it was trained
    return model.eval()


def merge_in_place(job: Job, folder: Path) -> torch.dtype:
    """Loads the base, adds the adapter in place and saves; returns the merged model's precision."""
    quantised = quantisation(job.base_config) is not None
    # PiSSA first takes from the base what it then adds to: in 16 bit the first rounding would not be undone.
    exact = str(getattr(job.config, "init_lora_weights", "")).startswith("pissa")
    model = fold(load_adapter(load_base(job, torch.float32 if exact else "auto"), job.adapter))
    if exact and not quantised:
        model = model.to(job.base_config.dtype or torch.float32)
    if quantised:
        # The dequantised model still carries what turns it back; its weights go into a plain one.
        del job.skeleton.config.quantization_config
        job.skeleton.load_state_dict(model.state_dict(), assign=True)
        job.skeleton.tie_weights()
        model = job.skeleton.to(torch.bfloat16)
        logger.info("the base is 4 or 8 bit: merged in bfloat16")
    model.save_pretrained(folder)
    return model.dtype


def write_config(job: Job, plan: Plan, folder: Path) -> None:
    """The base's config.json as it is, but for what the merge changes."""
    raw = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") != job.base_config.model_type:  # the text part of a model with images or sound
        raw = job.base_config.to_diff_dict()
    if (read_manifest(job.adapter) or {}).get("rope"):
        write_rope(raw, job.base_config)
    if plan.untied:
        logger.info("embedding and head were trained apart: they are not tied in the merged model")
        raw["tie_word_embeddings"] = False
    if job.scores:
        labels = {i: f"LABEL_{i}" for i in range(job.base_config.num_labels)}
        raw |= {"architectures": [type(job.skeleton).__name__], "num_labels": len(labels), "id2label": labels}
        raw |= {"label2id": {name: i for i, name in labels.items()}, "pad_token_id": job.tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_alongside(job: Job, folder: Path) -> None:
    """Tokenizer with its chat template, generation config, licence, and the files of a base with its own code."""
    for pattern in ALONGSIDE:
        for path in job.base.glob(pattern):
            shutil.copy(path, folder)
    job.tokenizer.save_pretrained(folder)
    sources = [job.adapter / "generation_config.json", job.base / "generation_config.json"]
    for source in [path for path in sources if path.is_file() and not job.scores][:1]:
        shutil.copy(source, folder)


# ── the check ───────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """Logits of every position of every prompt, (tokens, V), or of every prompt, (prompts, labels)."""
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in prompts]
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])


def check(job: Job, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Compares merged with base + adapter in float32, one model in memory at a time.

    Rounding the merged weights to a base's 16 bit moves the logits by more than a small mistake would. So base +
    adapter is also merged here by PEFT and rounded: what is left between that and the merged model has a tolerance.

    Raises:
        MergeError: if the difference left is above the tolerance, or not a number.
    """
    rows = job.skeleton.get_input_embeddings().weight.shape[0]
    texts = PROMPTS if job.scores else ["\n".join(PROMPTS)]  # one score a text, one row of logits a token
    prompts = [[i for i in job.tokenizer(text).input_ids if i < rows] or [0] for text in texts]
    wrapped = load_adapter(load_base(job, torch.float32), job.adapter)
    expected = rounded = logits_of(wrapped, prompts)
    with wrapped.disable_adapter():
        effect = largest(expected - logits_of(wrapped, prompts))
    if dtype != torch.float32:
        wrapped.merge_adapter()
        for name, parameter in wrapped.named_parameters():
            if ".score." not in name:
                parameter.data = parameter.data.to(dtype).float()
        rounded = logits_of(wrapped, prompts)
    del wrapped
    merged = job.auto.from_pretrained(folder, dtype=torch.float32, **{**job.options, "local_files_only": True}).eval()
    found = logits_of(merged, prompts)
    difference, left = largest(found - expected), largest(found - rounded)
    # float32 sums in another order, and a sum in another order may round the other way
    tolerance = TOLERANCE * max(1.0, largest(expected)) + 0.1 * largest(rounded - expected)
    told = f"largest difference of the logits {difference:.2e}"
    if dtype != torch.float32:
        told += f", {left:.2e} beyond rounding to {str(dtype).removeprefix('torch.')}"
    told += f", tolerance {tolerance:.2e}"
    if not (math.isfinite(tolerance) and left <= tolerance):
        raise MergeError(f"merged is not base + adapter: {told}. Is --base_model the one that it was trained on?")
    logger.info(f"merged = base + adapter in float32: {told}; the adapter moves them by up to {effect:.2e}")
    figures = {"largest_difference": difference, "beyond_rounding": left, "tolerance": tolerance}
    return {**figures, "adapter_effect": effect}


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()


# ── whole or nothing ────────────────────────────────────────────────────────────────────────────────────────────────


def check_output_dir(args: MergeArguments) -> Path:
    """Raises MergeError if something is there that was not asked to be replaced, or that is read from."""
    output_dir = Path(args.output_dir)
    for flag in ("lora_model", "base_model", "tokenizer_path"):
        other = getattr(args, flag)
        if other and Path(other).exists() and Path(other).resolve().is_relative_to(output_dir.resolve()):
            raise MergeError(f"--output_dir {output_dir} holds --{flag}: give another directory")
    if output_dir.is_file():
        raise MergeError(f"--output_dir {output_dir} is a file: give a directory")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise MergeError(f"--output_dir {output_dir} is not empty: add --overwrite_output_dir, or give another")
    return output_dir


@contextmanager
def whole_or_nothing(output_dir: Path) -> Iterator[Path]:
    """A directory beside `output_dir` that takes its place at the end; after an error nothing of it is left."""
    folder = output_dir.parent / f".{output_dir.name}.merging-{os.getpid()}"
    old = output_dir.parent / f".{output_dir.name}.replaced-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if output_dir.exists():
            os.replace(output_dir, old)
        os.replace(folder, output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_account(job: Job, folder: Path, name: str, plan: Plan | str, result: dict[str, float]) -> None:
    """run.json: this step at the end of the adapter's lineage, or of the base's; and README.md, which tells it."""
    before = read_manifest(job.adapter) or {}
    lineage = before.get("lineage") or (read_manifest(job.base) or {}).get("lineage", [])
    from_hub = not Path(job.name).is_dir()
    step = {"stage": "merge", "base_model": job.name if from_hub else str(job.base), "adapter": str(job.adapter)}
    step |= {"from_hub": True} if from_hub else {}
    licence = find_licence(job.base, called(job.name))
    if licence["id"] == UNKNOWN:
        logger.warning(f"licence of the base: unknown ({licence['source']}); README.md says so: fill it in there")
    else:
        logger.info(f"licence of the base: {licence['id']} ({licence['source']})")
    manifest = {**step, "lineage": [*lineage, step], "template": before.get("template"), **result}
    manifest |= {"status": "finished", "in_memory": plan if isinstance(plan, str) else None, "licence": licence}
    (folder / "run.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(folder, name, manifest, job.tokenizer, licence, job.scores)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse([MergeArguments], argv)
    output_dir = check_output_dir(args)
    job = prepare(args)
    if job.base.resolve().is_relative_to(output_dir.resolve()):
        raise MergeError(f"--output_dir {output_dir} holds the base: give another directory")
    plan = choose_plan(job)
    with whole_or_nothing(output_dir) as folder:
        if isinstance(plan, str):
            logger.info(f"merging in memory: {plan}")
            dtype = merge_in_place(job, folder)
        else:
            dtype = merge_shards(job.base, plan, folder)
            write_config(job, plan, folder)
        write_alongside(job, folder)
        write_account(job, folder, output_dir.resolve().name, plan, check(job, folder, dtype))
        for path in folder.iterdir():  # safetensors writes files that only their owner can read
            path.chmod((folder / "config.json").stat().st_mode)
    logger.info(f"merged model: {output_dir}")


if __name__ == "__main__":
    set_up_logging()
    try:
        main()
    except ArgumentError as error:
        sys.exit(f"error: {error}")
