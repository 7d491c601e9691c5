r"""Saves a model in 4 or 8 bit, and prints its size and its perplexity on a text before and after.

    python -m tools.quantize_model --model_name_or_path outputs/sft-merged --output_dir outputs/sft-4bit \
        --quantization bnb --quantization_bit 4 --text_file text.txt
    python -m tools.quantize_model --model_name_or_path outputs/sft-merged --output_dir outputs/sft-int8 \
        --quantization cpm --quantization_bit 8 --text_file text.txt

`bnb`: bitsandbytes (nf4 with double quantization, or int8), which `from_pretrained` loads directly. `cpm`: integer
steps with one scale per row, in plain torch (loaded by `stagewise/models/quantization/row_wise.py`). The output head
is not quantized. The saved model is loaded again to measure its perplexity; the directory appears completely, or not
at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewise.config.arguments import ModelArguments
from stagewise.errors import ArgumentError
from stagewise.training.first_look import first_look


@dataclass
class QuantizeArguments:
    model_name_or_path: str = field(metadata={"help": "Model in 16 or 32 bit: directory, or hub name."})
    output_dir: str = field(metadata={"help": "Where the quantized model is written."})
    quantization: str = field(default="bnb", metadata={"help": "bnb (bitsandbytes), or cpm (row-wise, plain torch)."})
    quantization_bit: int = field(default=4, metadata={"help": "4 or 8."})
    text_file: str | None = field(default=None, metadata={"help": "Text on which perplexity is measured."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a window of that text."})
    max_tokens: int = field(default=20000, metadata={"help": "Measure on at most so many tokens; -1 = all."})
    torch_dtype: str = field(default="auto", metadata={"help": "Precision of what is not quantized."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer directory or hub name; default: the model's."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a model at --output_dir."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where a hub model is cached."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    hf_hub_token: str | None = field(default=None, metadata={"help": "Token for a private hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that the model ships."})

    def model_arguments(self) -> ModelArguments:
        shared = ("model_name_or_path", "tokenizer_name_or_path", "cache_dir", "model_revision", "hf_hub_token")
        shared += ("torch_dtype", "trust_remote_code")
        return ModelArguments(**{name: getattr(self, name) for name in shared})


FLAGS = [QuantizeArguments]
if __name__ == "__main__":
    first_look(FLAGS, __doc__, code=2)  # a wrong flag or path is answered before torch has loaded

import gc
import importlib.util
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loguru import logger
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from stagewise.artifacts.atomic_directory import atomic_directory, check_place
from stagewise.artifacts.lineage import LICENCE_FILES, carry_license
from stagewise.artifacts.manifest import read_manifest, versions, write_manifest
from stagewise.config.checks import check_choice
from stagewise.config.command_line import parse
from stagewise.formats.json_lines import json_bytes
from stagewise.models.config import DTYPES, load_config
from stagewise.models.hub import find_source, hub_options
from stagewise.models.loading import load_causal_lm
from stagewise.models.quantization.bnb import guard_4bit
from stagewise.models.quantization.row_wise import check_rows, load_row_quantized, quantize_model
from stagewise.models.tokenizer import load_tokenizer
from stagewise.reports.model_card import public_name
from stagewise.reports.terminal_text import log_visible_text, print_error, visible
from stagewise.training.metrics import perplexity

# What a quantized model directory holds; --overwrite_output_dir removes these and nothing else.
WRITTEN = (
    *("config.json", "generation_config.json", "model*.safetensors*", "quantization.json", "run.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("additional_chat_templates", *LICENCE_FILES),
)


class QuantizeError(ArgumentError):
    """A model that cannot be quantized as requested; the message names the flag and what to do."""


# ── before any weight is read ───────────────────────────────────────────────────────────────────────────────────────


def check_flags(args: QuantizeArguments) -> None:
    """Raises QuantizeError or ArgumentError for flags that cannot be honored."""
    check_choice("quantization", args.quantization, ("bnb", "cpm"))
    check_choice("torch_dtype", args.torch_dtype, ("auto", *DTYPES))
    if args.quantization_bit not in (4, 8):
        raise QuantizeError(f"--quantization_bit: expected 4 or 8, found {args.quantization_bit}")
    if args.quantization == "bnb" and importlib.util.find_spec("bitsandbytes") is None:
        raise QuantizeError("--quantization bnb: bitsandbytes is missing: pip install bitsandbytes, or take cpm")
    if args.max_length < 2:
        raise QuantizeError(f"--max_length: expected at least 2 tokens, found {args.max_length}")
    if args.max_tokens != -1 and args.max_tokens < 2:
        raise QuantizeError(f"--max_tokens: expected -1 (all) or at least 2, found {args.max_tokens}")
    read = {flag: getattr(args, flag) for flag in ("model_name_or_path", "tokenizer_name_or_path")}
    check_place(Path(args.output_dir), args.overwrite_output_dir, read)


def read_windows(args: QuantizeArguments, tokenizer: Any) -> list[torch.Tensor]:
    """The text as windows of (1, at most --max_length) ids; empty without --text_file.

    Raises:
        QuantizeError: for a missing file, text that is not UTF-8, or less than two tokens.
    """
    if args.text_file is None:
        return []
    path = Path(args.text_file)
    if not path.is_file():
        raise QuantizeError(f"--text_file {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantizeError(f"--text_file {path}: not a text file in UTF-8: {error}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = ids if args.max_tokens == -1 else ids[: args.max_tokens]
    windows = [torch.tensor([ids[i : i + args.max_length]]) for i in range(0, len(ids), args.max_length)]
    windows = [window for window in windows if window.shape[1] > 1]  # one token alone has nothing to predict it
    if not windows:
        raise QuantizeError(f"--text_file {path}: expected at least two tokens, found {len(ids)}")
    return windows


def check_model(args: QuantizeArguments, config: PretrainedConfig) -> None:
    """Refuses models that do not support the format, using a skeleton without weights.

    Raises:
        QuantizeError: for a model that is already quantized, a reward model, or one without layers to quantize.
    """
    name = args.model_name_or_path
    if getattr(config, "quantization_config", None):
        raise QuantizeError(f"--model_name_or_path {name}: is quantized already; give the model in 16 or 32 bit")
    if any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
        raise QuantizeError(f"--model_name_or_path {name}: a reward model; only language models are quantized here")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    if args.quantization == "cpm":
        check_rows(skeleton, args.quantization_bit)
    elif not bnb_layers(skeleton):
        raise QuantizeError(
            f"--quantization bnb: {type(skeleton).__name__} has no layers that it takes; use --quantization cpm"
        )
    bare = sum(p.numel() for n, p in skeleton.named_parameters() if p.dim() == 3 and "expert" in n)
    if bare:
        share = bare / sum(p.numel() for p in skeleton.parameters())
        logger.info(f"experts are held as 3-D parameters, no layers: {share:.0%} of the weights stay as they are")


def bnb_layers(model: PreTrainedModel) -> list[str]:
    """The layers that transformers replaces when loading with bitsandbytes."""
    kept = get_keys_to_not_convert(model)
    kinds = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear or isinstance(m, Conv1D)}
    return sorted(name for name in kinds if should_convert_module(name, kept))


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def text_loss(model: PreTrainedModel, windows: list[torch.Tensor]) -> tuple[float, int]:
    """Mean negative log-likelihood in nats of all tokens except each window's first, and their number."""
    device = model.get_input_embeddings().weight.device
    total, tokens = 0.0, 0
    for window in windows:
        window = window.to(device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
        tokens += window.shape[1] - 1
    return total / tokens, tokens


def measured(model: PreTrainedModel, windows: list[torch.Tensor]) -> dict[str, float]:
    found: dict[str, float] = {"bytes": weight_bytes(model)}
    if windows:
        began = time.time()
        loss, tokens = text_loss(model, windows)
        if not math.isfinite(loss):
            raise QuantizeError(f"--text_file: the loss is {loss}; the model's numbers overflow in {model.dtype}")
        found |= {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens}
        logger.info(f"perplexity {found['perplexity']:.3f} on {tokens} tokens ({time.time() - began:.0f} s)")
    return found


# ── quantizing and loading ──────────────────────────────────────────────────────────────────────────────────────────


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(args: QuantizeArguments) -> PreTrainedModel:
    return load_causal_lm(args.model_arguments(), for_training=False).to(device())


def load_for_bnb(args: QuantizeArguments) -> PreTrainedModel:
    """Loads the base, quantized by bitsandbytes while it loads."""
    source = find_source(args.model_name_or_path, args.model_arguments())
    dtype = "auto" if args.torch_dtype == "auto" else DTYPES[args.torch_dtype]
    if args.quantization_bit == 8:
        form = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = load_config(args.model_arguments()).dtype if dtype == "auto" else dtype
        form = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute or torch.float32,
        )
    options = hub_options(source, args.model_arguments())
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=form, dtype=dtype, device_map={"": str(device())}, **options
    )
    guard_4bit(model)
    return model.eval()


def load_saved(folder: Path, args: QuantizeArguments) -> PreTrainedModel:
    """Loads the saved model in the same way as its users."""
    options = {"dtype": "auto", "device_map": {"": str(device())}, "trust_remote_code": args.trust_remote_code}
    if args.quantization == "cpm":
        return load_row_quantized(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    guard_4bit(model)
    return model.eval()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quantize(args: QuantizeArguments) -> dict[str, Any]:
    """Runs the quantization and returns the account that is written to quantization.json.

    Raises:
        ArgumentError: (or a subclass) with the flag that cannot be honored, before any weights are read.
    """
    check_flags(args)
    config = load_config(args.model_arguments())
    check_model(args, config)
    tokenizer = load_tokenizer(args.model_arguments())
    windows = read_windows(args, tokenizer)
    model = load_base(args)
    before = measured(model, windows)
    if args.quantization == "bnb":
        del model
        free()
        model = load_for_bnb(args)
    else:
        model = quantize_model(model, args.quantization_bit)
    with atomic_directory(Path(args.output_dir), args.overwrite_output_dir, replaces=WRITTEN) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        free()
        saved = load_saved(folder, args)
        after = measured(saved, windows)
        del saved
        free()
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        account = {
            "base_model": args.model_name_or_path,
            "quantization": args.quantization,
            "quantization_bit": args.quantization_bit,
            "before": before,
            "after": {**after, "file_bytes": files},
            "versions": versions(),
        }
        write_account(folder, args, account)
    return account


def write_account(folder: Path, args: QuantizeArguments, account: dict[str, Any]) -> None:
    """Writes quantization.json, and run.json with the lineage if the base has one."""
    (folder / "quantization.json").write_bytes(json_bytes(account, indent=2))
    base = Path(args.model_name_or_path)
    if not base.is_dir():  # of a hub's model only what loads is here
        return
    license = carry_license(base, folder, public_name(args.model_name_or_path))
    if earlier := read_manifest(base):
        step = {"stage": "quantize", "base_model": args.model_name_or_path, "form": account["quantization"]}
        lineage = [*earlier.get("lineage", []), {**step, "bits": account["quantization_bit"]}]
        manifest = {"stage": "quantize", "status": "finished", "lineage": lineage, "versions": account["versions"]}
        manifest |= {"license": license}
        write_manifest(folder, manifest, weights=True)


def as_table(account: dict[str, Any]) -> str:
    """Size and perplexity, before and after, as Markdown."""
    before, after = account["before"], account["after"]
    name = f"{account['quantization']} {account['quantization_bit']} bit"
    lines = ["| | weights MiB | perplexity |", "|---|---:|---:|"]
    for title, found in (("before", before), (name, after)):
        shown = f"{found['perplexity']:.3f}" if "perplexity" in found else "not measured"
        lines.append(f"| {title} | {found['bytes'] / 2**20:,.1f} | {shown} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that it casts to float16
    logger.remove()
    log_visible_text()
    logger.add(lambda message: sys.stderr.write(message), level="INFO", format="{time:HH:mm:ss} {message}")
    try:
        (args,) = parse(FLAGS, argv, description=__doc__)
        account = quantize(args)
    except ValueError as error:
        if not type(error).__module__.startswith(("stagewise", "tools", "__main__")):
            raise
        print_error(error)
        raise SystemExit(2) from error
    print(visible(as_table(account)))


if __name__ == "__main__":
    main()
