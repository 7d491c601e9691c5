"""Folds an adapter into its base and writes a plain model directory, checked against base + adapter.

    python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged
    python merge_peft_adapter.py --base_model Qwen/Qwen3-0.6B --lora_model outputs/sft --output_dir outputs/sft-merged

The base is read tensor by tensor and written shard by shard (W + scale · B A in float32, cast back to the base's own
precision), so that one shard is in memory, never base and result. Where a base's files do not allow that, the model is
loaded and merged in place, and the log says why. Base + adapter and the merged model are then run in float32 on the
same prompts; above the printed tolerance nothing is left at --output_dir.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loguru import logger
from peft import PeftConfig, get_peft_model, load_peft_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stagewise.adapter import fold, keep_tie, load_adapter, read_adapter_config, refuse_unmergeable
from stagewise.arguments import ArgumentError, ModelArguments, parse
from stagewise.model import find_source, guard_4bit, hub_options, load_config, refuse_adapter

PREFIX = "base_model.model."  # before every name in an adapter's file
INDEX = "model.safetensors.index.json"
# Largest difference of logits allowed, as a share of the largest logit: a few roundings of the weights.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROMPTS = (
    "Drink enough water, sleep well, and ask a doctor if",
    "多喝水,好好休息。",
    "def add(a, b):\n    return a + b\n",
)
ALONGSIDE = ("*.py", "preprocessor_config.json", "processor_config.json", "tokenizer.model")


@dataclass
class MergeArguments:
    lora_model: str = field(metadata={"help": "The adapter's directory."})
    output_dir: str = field(metadata={"help": "Where the merged model is written."})
    base_model: str | None = field(default=None, metadata={"help": "Default: the base named in adapter_config.json."})
    tokenizer_path: str | None = field(
        default=None, metadata={"help": "Default: the adapter's tokenizer, else the base's."}
    )
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
    """What is merged: everything that was found out before a weight was read."""

    args: ModelArguments  # of the base, whose model_name_or_path is a local directory
    adapter: Path
    config: PeftConfig
    base_config: PretrainedConfig
    weights: dict[str, torch.Tensor]  # the adapter's, without PREFIX
    tokenizer: PreTrainedTokenizerBase
    rows: int  # of the merged embedding

    @property
    def base(self) -> Path:
        return Path(self.args.model_name_or_path)

    @property
    def auto(self) -> type:
        scored = self.config.task_type == "SEQ_CLS"
        return AutoModelForSequenceClassification if scored else AutoModelForCausalLM


# ------------------------------------------------------------------------------------------------------------- plan


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
    shared = {f: getattr(args, f) for f in ("model_type", "cache_dir", "model_revision", "hf_hub_token")}
    model_args = ModelArguments(name, trust_remote_code=args.trust_remote_code, **shared)
    model_args.model_name_or_path = download(find_source(name, model_args, "base_model"), model_args)
    refuse_adapter(model_args.model_name_or_path, "base_model")
    base_config = load_config(model_args)
    if isinstance(getattr(config, "base_model_name_or_path", None), str) and config.base_model_name_or_path != name:
        logger.info(f"base: {name} in place of {config.base_model_name_or_path}, which the adapter names")
    weights = {k.removeprefix(PREFIX): v for k, v in load_peft_weights(str(adapter), device="cpu").items()}
    tokenizer = load_merge_tokenizer(args, adapter, model_args)
    if config.task_type == "SEQ_CLS":
        scored = base_config.get_text_config() if "score.weight" in weights else base_config
        base_config = base_config if type(base_config) in AutoModelForSequenceClassification._model_mapping else scored
        base_config.num_labels = len(weights["score.weight"]) if "score.weight" in weights else 1
        base_config.pad_token_id = base_config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rows = choose_rows(args, base_config, weights, tokenizer)
    return Job(model_args, adapter, config, base_config, weights, tokenizer, rows)


def download(source: str, args: ModelArguments) -> str:
    """A local directory as it is; a hub model's files are fetched (safetensors, or .bin where there are none)."""
    if Path(source).is_dir():
        return source
    options = {"revision": args.model_revision, "token": args.hf_hub_token, "cache_dir": args.cache_dir}
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        folder = snapshot_download(source, allow_patterns=wanted, **options)
        if not list(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(source, allow_patterns=[*wanted, "*.bin"], **options)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MergeError(
            f"--base_model {source}: no such directory, and no hub model could be fetched: {error}"
        ) from error
    return folder


def load_merge_tokenizer(args: MergeArguments, adapter: Path, base: ModelArguments) -> PreTrainedTokenizerBase:
    """--tokenizer_path, else the adapter's own, else the base's; its chat template comes along."""
    own = (adapter / "tokenizer_config.json").is_file()
    source = args.tokenizer_path or (str(adapter) if own else base.model_name_or_path)
    source = find_source(source, base, "tokenizer_path")
    try:
        return AutoTokenizer.from_pretrained(source, **hub_options(source, base))
    except (OSError, ValueError) as error:
        raise MergeError(f"--tokenizer_path {source}: no tokenizer could be loaded: {error}") from error


def choose_rows(
    args: MergeArguments, config: PretrainedConfig, weights: dict, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Rows of the merged embedding: the base's, the adapter's own if it was trained resized, or more for --resize_emb."""
    rows = config.get_text_config().vocab_size
    trained = [
        len(weights[k]) for k in weights if k.endswith(("embed_tokens.weight", "embeddings.weight", "wte.weight"))
    ]
    rows = trained[0] if trained else rows
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        if args.resize_emb:
            logger.info(f"--resize_emb: nothing to add, {rows} rows hold the tokenizer's {needed}")
        return rows
    if not args.resize_emb:
        raise MergeError(
            f"the tokenizer needs {needed} rows, the embedding has {rows}: add --resize_emb, or fix --tokenizer_path"
        )
    logger.info(f"--resize_emb: {rows} rows become {needed}; the new ones are the mean of the old and untrained")
    return needed


# --------------------------------------------------------------------------------------------------- shard by shard


@dataclass
class Plan:
    """Names are those in the base's files."""

    files: dict[str, list[str]]  # shard → names
    layers: dict[str, BaseTunerLayer]  # name → the adapter's layer that is added to it
    whole: dict[str, torch.Tensor]  # name → the tensor that takes its place
    new: dict[str, torch.Tensor]  # tensors that the base does not have
    dropped: set[str]
    config: dict[str, Any]  # changed entries of config.json


def plan_shards(job: Job) -> Plan | str:
    """Finds each adapted weight in the base's safetensors by name; a str says why that is not possible."""
    if getattr(job.base_config, "quantization_config", None):
        return "the base is quantised and has to be reloaded in 16 bit"
    if job.config.peft_type.value != "LORA":
        return f"{job.config.peft_type.value} layers merge through PEFT"
    if job.config.use_dora or job.config.lora_bias or job.config.target_parameters:
        return "DoRA, adapter biases and adapters on bare parameters merge through PEFT"
    if job.rows != job.base_config.get_text_config().vocab_size:
        return "the embedding gets more rows"
    files = shards_of(job.base)
    if not files:
        return "the base has no safetensors files"
    lora = {k: v for k, v in job.weights.items() if ".lora_" in k}
    whole = {k: v for k, v in job.weights.items() if k not in lora}
    skeleton, layers = adapted_layers(job, lora)
    stored = {name for names in files.values() for name in names}
    prefix = skeleton.base_model_prefix + "."

    def in_base(name: str) -> str | None:
        """BLOOM and GPT-2 checkpoints, among others, leave the inner model's prefix out."""
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in stored), None)

    lost = [name for name in layers if in_base(name) is None]
    if lost:
        return f"the base's files do not have {lost[0]} ({len(lost)} such names): they are converted while loading"
    plan = Plan(files, {in_base(name): layer for name, layer in layers.items()}, {}, {}, set(), {})
    place_whole(job, skeleton, whole, in_base, plan)
    return plan


def place_whole(job: Job, skeleton: PreTrainedModel, whole: dict[str, torch.Tensor], in_base, plan: Plan) -> None:
    """Sorts the modules saved in full into `plan`: in place of the base's, new, or left out because they are tied."""
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        first, second = (next(n for n, m in skeleton.named_modules() if m is x) + ".weight" for x in (embedding, head))
        if first in whole and torch.equal(whole[first], whole.get(second, whole[first])):
            whole = {name: tensor for name, tensor in whole.items() if name != second}
            plan.dropped |= {second} & {name for names in plan.files.values() for name in names}
        elif first in whole or second in whole:
            logger.info("embedding and head were trained apart: they are no longer tied in the merged model")
            plan.config["tie_word_embeddings"] = False
            if second not in whole:
                raise MergeError(f"{job.adapter}: the tied head was trained without the embedding being saved")
    for name, tensor in whole.items():
        target = in_base(name)
        (plan.new if target is None else plan.whole)[target or name] = tensor
    if job.config.task_type == "SEQ_CLS":
        plan.dropped |= {"lm_head.weight"} & {name for names in plan.files.values() for name in names}


def shards_of(folder: Path) -> dict[str, list[str]]:
    """Each safetensors file of a model directory with the names in it, in order."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    files = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as shard:
            files[name] = list(shard.keys())
    return files


def adapted_layers(job: Job, lora: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, dict[str, LoraLayer]]:
    """Builds the base without weights, so that PEFT says each layer's scale and orientation; fills A and B in."""
    with torch.device("meta"):
        skeleton = job.auto.from_config(job.base_config, trust_remote_code=job.args.trust_remote_code)
    skeleton.tie_weights()
    config = PeftConfig.from_pretrained(str(job.adapter), inference_mode=True)
    config.modules_to_save, config.ensure_weight_tying = None, False  # taken from the file as they are
    wrapped = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    modules = dict(wrapped.get_base_model().named_modules())
    layers, unused = {}, set(lora)
    for path, layer in modules.items():
        if not isinstance(layer, LoraLayer):
            continue
        for kind in layer.adapter_layer_names:
            for key in (f"{path}.{kind}", f"{path}.{kind}.weight"):
                if key in lora:
                    holder = getattr(layer, kind)
                    tensor = torch.nn.Parameter(lora[key].float(), requires_grad=False)
                    if key.endswith(".weight"):
                        holder["default"].weight = tensor
                    else:
                        holder["default"] = tensor
                    unused.discard(key)
        layers[f"{path}.weight"] = layer
    if unused or not layers:
        raise MergeError(
            f"{job.adapter}: {type(skeleton).__name__} has no layer for {sorted(unused)[:3] or 'the adapter'}"
        )
    return wrapped.unload(), layers


def merge_shards(job: Job, plan: Plan, folder: Path) -> torch.dtype:
    """Writes shards of the base's layout into `folder`; returns the base's precision."""
    weight_map, size, dtypes = {}, 0, set()
    last = list(plan.files)[-1]
    bar = tqdm(
        total=sum(map(len, plan.files.values())), desc="merging", unit="tensor", disable=not sys.stderr.isatty()
    )
    for file, names in plan.files.items():
        shard = {}
        with safe_open(job.base / file, framework="pt") as base:
            for name in names:
                bar.update()
                if name in plan.dropped:
                    continue
                shard[name] = merged_tensor(name, base.get_tensor(name), plan)
                if name in plan.layers:
                    dtypes.add(shard[name].dtype)
        if file == last:
            shard |= {name: tensor.contiguous() for name, tensor in plan.new.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    bar.close()
    if (job.base / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    write_config(job, plan, folder)
    return max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0))


def merged_tensor(name: str, tensor: torch.Tensor, plan: Plan) -> torch.Tensor:
    """One tensor of the result, in the precision that it has in the base."""
    if name in plan.whole:
        new = plan.whole[name]
        if new.shape != tensor.shape:
            raise MergeError(
                f"{name}: the adapter has {tuple(new.shape)}, the base {tuple(tensor.shape)}: another base?"
            )
        tensor = new.to(tensor.dtype)
    if name in plan.layers:
        delta = plan.layers[name].get_delta_weight("default")
        if delta.shape != tensor.shape:
            raise MergeError(
                f"{name}: the adapter has {tuple(delta.shape)}, the base {tuple(tensor.shape)}: another base?"
            )
        tensor = (tensor.float() + delta.float()).to(tensor.dtype)
    return tensor.contiguous()


def write_config(job: Job, plan: Plan, folder: Path) -> None:
    """The base's config.json as it is, but for what the merge changes."""
    raw = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") != job.base_config.model_type:  # the text model of a larger one
        raw = job.base_config.to_diff_dict()
    if job.config.task_type == "SEQ_CLS":
        mapping = AutoModelForSequenceClassification._model_mapping
        labels = {i: f"LABEL_{i}" for i in range(job.base_config.num_labels)}
        raw["architectures"] = [mapping[type(job.base_config)].__name__]
        raw["num_labels"], raw["pad_token_id"] = job.base_config.num_labels, job.base_config.pad_token_id
        raw["id2label"], raw["label2id"] = labels, {name: i for i, name in labels.items()}
    (folder / "config.json").write_text(
        json.dumps(raw | plan.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


# -------------------------------------------------------------------------------------------------------- in memory


def load_base(job: Job, dtype: torch.dtype | str) -> PreTrainedModel:
    """The base with the merged model's number of rows; a 4- or 8-bit base comes back in 16 bit."""
    model = job.auto.from_pretrained(
        job.base, config=job.base_config, dtype=dtype, **hub_options(str(job.base), job.args)
    )
    guard_4bit(model)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=torch.bfloat16 if dtype == "auto" else dtype)
        model.config.__dict__.pop("quantization_config", None)
    if job.rows != model.get_input_embeddings().weight.shape[0]:
        old = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(job.rows, mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight.data[old:] = module.weight.data[:old].float().mean(dim=0).to(module.weight.dtype)
    return model.eval()


def merge_loaded(job: Job, folder: Path) -> torch.dtype:
    """Loads the base, adds the adapter in place and saves; returns the base's precision."""
    model = load_base(job, "auto")
    dtype = model.dtype
    fold(load_adapter(model, job.adapter)).save_pretrained(folder)
    return dtype


# ------------------------------------------------------------------------------------------------------------ check


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """float32 logits of every position of every prompt, (tokens, V), or of every prompt, (prompts, labels)."""
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in prompts]
    return torch.cat([row.reshape(-1, row.shape[-1]).float() for row in rows])


def check(job: Job, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Compares merged with base + adapter in float32, one model in memory at a time.

    Raises:
        MergeError: if the largest difference of the logits is above the tolerance, or not a number.
    """
    rows = job.base_config.get_text_config().vocab_size
    prompts = [[i for i in job.tokenizer(text).input_ids if i < rows] or [0] for text in PROMPTS]
    wrapped = load_adapter(load_base(job, torch.float32), job.adapter)
    expected = logits_of(wrapped, prompts)
    with wrapped.disable_adapter():
        effect = (expected - logits_of(wrapped, prompts)).abs().max().item()
    del wrapped
    merged = job.auto.from_pretrained(folder, dtype=torch.float32, **hub_options(str(folder), job.args)).eval()
    difference = (logits_of(merged, prompts) - expected).abs().max().item()
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * expected.abs().max().item()
    told = f"largest difference of the logits {difference:.2e}, tolerance {tolerance:.2e}; the adapter moves them by {effect:.2e}"
    if not difference <= tolerance:
        raise MergeError(f"the merged model is not base + adapter: {told}. Is --base_model the one it was trained on?")
    logger.info(f"checked against base + adapter in float32: {told}")
    return {"largest_difference": difference, "tolerance": tolerance, "adapter_effect": effect}


# ----------------------------------------------------------------------------------------------------------- finish


def write_alongside(job: Job, folder: Path) -> None:
    """Tokenizer with its chat template, generation config, and the files of a base with its own code."""
    for pattern in ALONGSIDE:
        for path in job.base.glob(pattern):
            shutil.copy(path, folder)
    job.tokenizer.save_pretrained(folder)
    for source in (job.adapter, job.base):
        if (source / "generation_config.json").is_file() and job.config.task_type != "SEQ_CLS":
            shutil.copy(source / "generation_config.json", folder)
            return


def lineage_of(job: Job) -> list[dict[str, Any]]:
    """What the adapter's run.json says of its ancestors; an adapter made elsewhere has none."""
    path = job.adapter / "run.json"
    return json.loads(path.read_text(encoding="utf-8")).get("lineage", []) if path.is_file() else []


@contextmanager
def whole_or_nothing(output_dir: Path, overwrite: bool):
    """A directory beside `output_dir` that takes its place at the end; after an error neither is left behind."""
    folder = output_dir.parent / f".{output_dir.name}.merging-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if output_dir.exists():
            if not overwrite and any(output_dir.iterdir()):
                raise MergeError(f"--output_dir {output_dir}: filled by something else meanwhile")
            shutil.rmtree(output_dir)
        os.replace(folder, output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output_dir(args: MergeArguments) -> Path:
    """Raises MergeError if something is there that was not asked to be replaced, or that is read from."""
    output_dir = Path(args.output_dir)
    for flag in ("lora_model", "base_model", "tokenizer_path"):
        other = getattr(args, flag)
        if other and Path(other).exists() and Path(other).resolve().is_relative_to(output_dir.resolve()):
            raise MergeError(f"--output_dir {output_dir} holds --{flag}: give another directory")
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir):
        raise MergeError(
            f"--output_dir {output_dir} is not empty: add --overwrite_output_dir, or give another directory"
        )
    return output_dir


def main(argv: list[str] | None = None) -> None:
    (args,) = parse([MergeArguments], argv)
    output_dir = check_output_dir(args)
    job = prepare(args)
    if output_dir.exists() and job.base.resolve().is_relative_to(output_dir.resolve()):
        raise MergeError(f"--output_dir {output_dir} holds the base: give another directory")
    plan = plan_shards(job)
    with whole_or_nothing(output_dir, args.overwrite_output_dir) as folder:
        if isinstance(plan, str):
            logger.info(f"merging in memory: {plan}")
            dtype = merge_loaded(job, folder)
        else:
            logger.info(
                f"merging {len(plan.layers)} layers, {len(plan.files)} shards, {len(plan.whole | plan.new)} in full"
            )
            dtype = merge_shards(job, plan, folder)
        write_alongside(job, folder)
        result = check(job, folder, dtype)
        step = {"stage": "merge", "base_model": str(job.base), "adapter": str(job.adapter)}
        manifest = {
            **step,
            "lineage": [*lineage_of(job), step],
            "in_memory": plan if isinstance(plan, str) else None,
            **result,
        }
        (folder / "run.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    logger.info(f"merged model: {output_dir}")


if __name__ == "__main__":
    try:
        main()
    except ArgumentError as error:
        sys.exit(f"error: {error}")
