"""Merges an adapter into its base and writes a plain model directory, checked against base + adapter.

    python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged
    python merge_peft_adapter.py --base_model Qwen/Qwen3-0.6B --lora_model outputs/sft --output_dir outputs/sft-merged

The base is read tensor by tensor and written shard by shard (W + scale · B A in float32, cast back to the base's own
precision), so only one shard is in memory at a time. Where a base's files do not allow that, the model is loaded and
merged in memory, and the log says why. Base + adapter and the merged model are then run in float32 on the same
prompts; if their logits differ by more than the printed tolerance, nothing is left at --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewise.training.first_look import first_look


@dataclass
class MergeArguments:
    lora_model: str = field(metadata={"help": "The adapter's directory."})
    output_dir: str = field(metadata={"help": "Output folder for the merged model."})
    base_model: str | None = field(default=None, metadata={"help": "Default: the base named in adapter_config.json."})
    tokenizer_path: str | None = field(default=None, metadata={"help": "Default: the adapter's, else the base's."})
    resize_emb: bool = field(
        default=False, metadata={"help": "Add rows to the embedding if the tokenizer needs them."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an existing --output_dir."})
    model_type: str = field(default="auto", metadata={"help": "Expected architecture; checked against the config."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where a hub base is cached."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub base."})
    hf_hub_token: str | None = field(default=None, metadata={"help": "Token for a private hub base."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that the base ships."})


FLAGS = [MergeArguments]
if __name__ == "__main__":
    first_look(FLAGS, __doc__)  # report a wrong flag or path before torch is imported

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loguru import logger
from peft import load_peft_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.adapters.files import read_adapter_config, refuse_unmergeable
from stagewise.adapters.merge import MergeJob, merge_and_save
from stagewise.adapters.merge_check import check_merged
from stagewise.adapters.merge_sharded import Plan, merge_shards, plan_shards, tied_names
from stagewise.artifacts.atomic_directory import atomic_directory, check_place
from stagewise.artifacts.json_files import read_object
from stagewise.artifacts.lineage import LICENCE_FILES, UNKNOWN, copy_beside, find_license
from stagewise.artifacts.manifest import read_manifest, write_manifest
from stagewise.artifacts.weight_files import AGAIN, check_hashes
from stagewise.chat.reward_template import (
    Reading,
    carry_reward_form,
    is_older_reward_model,
    older_notice,
    saved_reading,
)
from stagewise.chat.select import choose_template
from stagewise.config.arguments import ChatArguments, ModelArguments
from stagewise.config.command_line import parse
from stagewise.errors import ArgumentError, MergeError
from stagewise.models.attention.rope import write_rope
from stagewise.models.config import load_config
from stagewise.models.hub import check_adapter, find_source, hub_options, no_hub_model
from stagewise.models.reward_head import reward_config
from stagewise.models.tokenizer import open_tokenizer
from stagewise.reports.error_hints import errors_explained
from stagewise.reports.logs import set_up_logging
from stagewise.reports.model_card import public_name, write_card
from stagewise.reports.terminal_text import print_error

PREFIX = "base_model.model."  # the prefix of every name in an adapter's file
LESS_MEMORY = (
    "The check holds base and adapter in float32, 4 bytes per parameter: close what else uses memory, or merge on a "
    "machine that has more."
)
ALONGSIDE = ("*.py", "preprocessor_config.json", "processor_config.json", "tokenizer.model", *LICENCE_FILES)


# ── what is merged, and how ────────────────────────────────────────────────────────────────────────────────────────


def prepare(args: MergeArguments) -> MergeJob:
    """Reads configs, tokenizer and adapter; refuses what cannot be merged before the base's weights are read."""
    check_adapter(args.lora_model, "lora_model")
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
    check_earlier_adapter(adapter, base)
    model_args.kept_rope = (read_manifest(adapter) or {}).get("rope")
    base_config = load_config(model_args)
    tokenizer = read_tokenizer(args, adapter, model_args)
    check_hashes(Path(base))
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
    return MergeJob(Path(base), name, adapter, config, base_config, auto, skeleton, weights, tokenizer, rows, options)


def check_earlier_adapter(adapter: Path, base: str) -> None:
    """Checks the base of an adapter trained with --checkpoint_dir: a model with that earlier adapter merged in.

    Raises:
        MergeError: `base` is not the result of that merge; the message gives the command that makes it.
    """
    earlier = (read_manifest(adapter) or {}).get("lineage") or [{}]
    first = earlier[-1].get("merged_adapter")
    if first is None:
        return
    merged, below = (read_manifest(base) or {}).get("adapter"), earlier[-1].get("base_model")
    if merged is None or Path(merged).resolve() != Path(first).resolve():
        raise MergeError(
            f"--lora_model {adapter}: was trained on {below} with {first} merged in. Merge that: "
            f"python merge_peft_adapter.py --base_model {below} --lora_model {first} "
            "--output_dir MERGED; then give --base_model MERGED here"
        )


def fetch(source: str, args: ModelArguments) -> str:
    """The base as a local directory; a hub model's files are downloaded (safetensors, or .bin if there are none)."""
    if Path(source).is_dir():
        return source
    options = {"revision": args.model_revision, "token": args.hf_hub_token, "cache_dir": args.cache_dir}
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", *LICENCE_FILES]
    try:
        folder = snapshot_download(source, allow_patterns=wanted, **options)
        if not list(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(source, allow_patterns=[*wanted, "*.bin"], **options)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MergeError(f"--base_model {source}: {no_hub_model(error)}") from error
    return folder


def read_tokenizer(args: MergeArguments, adapter: Path, base: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_path, else the adapter's, else the base's, with its chat template."""
    own = str(adapter) if (adapter / "tokenizer_config.json").is_file() else base.model_name_or_path
    source = find_source(args.tokenizer_path or own, base, "tokenizer_path")
    tokenizer = open_tokenizer(source, "tokenizer_path", hub_options(source, base))
    if is_older_reward_model(adapter):
        # a copy: the saved tokenizer stays as the model was trained
        template = choose_template(copy.deepcopy(tokenizer), ChatArguments())
        logger.warning(older_notice(adapter, tokenizer, template))
    if source != own and saved_reading(adapter) is Reading.MARKED:
        trained = open_tokenizer(own, "lora_model", hub_options(own, base))
        if not carry_reward_form(tokenizer, trained):
            raise MergeError(f"--tokenizer_path {source}: has no token {trained.pad_token!r}, which the reward model "
                             "was trained with as its padding; leave the flag out")  # fmt: skip
    return tokenizer


def grown(rows: int, tokenizer: PreTrainedTokenizerBase, resize: bool) -> int:
    """The number of rows of the merged embedding: unchanged, or more if --resize_emb adds rows for the tokenizer."""
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


def choose_plan(job: MergeJob) -> Plan | str:
    """Plans a merge shard by shard, or gives the reason why it has to be done in memory."""
    if job.rows != job.skeleton.get_input_embeddings().weight.shape[0]:
        return "the embedding has more rows than the base's"
    return plan_shards(job.base, job.skeleton, job.config, job.weights)


# ── what is written beside the weights ──────────────────────────────────────────────────────────────────────────────


def write_config(job: MergeJob, plan: Plan, folder: Path) -> None:
    """Writes the base's config.json with the changes that the merge makes."""
    raw = read_object(job.base / "config.json", AGAIN)
    if raw.get("model_type") != job.base_config.model_type:  # the text config of a multimodal model
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
        if "text_config" in raw:  # transformers looks for the pad token of a multimodal model there
            raw["text_config"] |= {"pad_token_id": job.tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_alongside(job: MergeJob, folder: Path) -> None:
    """Writes the tokenizer with its chat template, generation config, license, and the code files of a base that has
    any.
    """
    copy_beside(job.base, ALONGSIDE, folder)
    job.tokenizer.save_pretrained(folder)
    sources = [job.adapter / "generation_config.json", job.base / "generation_config.json"]
    for source in [path for path in sources if path.is_file() and not job.scores][:1]:
        shutil.copy(source, folder)


def write_account(job: MergeJob, folder: Path, name: str, plan: Plan | str, result: dict[str, float]) -> None:
    """Writes run.json, with this step at the end of the lineage of adapter or base, and README.md from it."""
    before = read_manifest(job.adapter) or {}
    lineage = before.get("lineage") or (read_manifest(job.base) or {}).get("lineage", [])
    from_hub = not Path(job.name).is_dir()
    step = {"stage": "merge", "base_model": job.name if from_hub else str(job.base), "adapter": str(job.adapter)}
    step |= {"from_hub": True} if from_hub else {}
    license = find_license(job.base, public_name(job.name))
    if license["id"] == UNKNOWN:
        logger.warning(f"license of the base: unknown ({license['source']}); README.md says so: fill it in there")
    else:
        logger.info(f"license of the base: {license['id']} ({license['source']})")
    manifest = {**step, "lineage": [*lineage, step], "template": before.get("template"), **result}
    manifest |= {"status": "finished", "in_memory": plan if isinstance(plan, str) else None, "license": license}
    write_manifest(folder, manifest, weights=True)
    write_card(folder, name, manifest, job.tokenizer, license, job.scores)


def main(argv: list[str] | None = None) -> None:
    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────
    (args,) = parse(FLAGS, argv, description=__doc__)
    with errors_explained("output_dir", args.output_dir, LESS_MEMORY):
        merge(args)


def merge(args: MergeArguments) -> None:
    output_dir = Path(args.output_dir)
    read = {flag: getattr(args, flag) for flag in ("lora_model", "base_model", "tokenizer_path")}
    check_place(output_dir, args.overwrite_output_dir, read)

    # ── base and adapter ─────────────────────────────────────────────────────────────────────────────────────────
    job = prepare(args)
    if job.base.resolve().is_relative_to(output_dir.resolve()):
        raise MergeError(f"--output_dir {output_dir} holds the base: give another directory")
    plan = choose_plan(job)

    # ── merge and check ──────────────────────────────────────────────────────────────────────────────────────────
    with atomic_directory(output_dir, args.overwrite_output_dir) as folder:
        if isinstance(plan, str):
            logger.info(f"merging in memory: {plan}")
            dtype = merge_and_save(job, folder)
        else:
            dtype = merge_shards(job.base, plan, folder)
            write_config(job, plan, folder)
        write_alongside(job, folder)
        write_account(job, folder, output_dir.resolve().name, plan, check_merged(job, folder, dtype))
    logger.info(f"merged model: {output_dir}")


if __name__ == "__main__":
    set_up_logging()
    try:
        main()
    except ArgumentError as error:
        print_error(error)
        sys.exit(1)
