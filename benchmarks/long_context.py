"""Perplexity of one text in windows of several lengths: a model as it is, and with its positions scaled.

    python benchmarks/long_context.py --model models/SmolLM2-135M-Instruct --text book.txt --output_dir outputs/long

The end of the text is measured (--windows of the longest length; the same tokens at every length), what stands before
it is trained on, or --train_text. Rows of the table: the model as it is; each scaling without training; linear scaling
after --steps of LoRA training at each length beyond the model's own context, merged. Every row is loaded, trained and
merged by this project's own scripts. Runs on a CPU too, as a smoke test: lengths that a tiny model has.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from stagewise.config.arguments import ModelArguments  # noqa: E402
from stagewise.models.attention.rope import context_of  # noqa: E402
from stagewise.models.config import load_config  # noqa: E402
from stagewise.models.loading import load_causal_lm  # noqa: E402
from stagewise.models.tokenizer import load_tokenizer  # noqa: E402

CHUNK = 2048  # positions whose logits are in memory at a time


def split_text(args: argparse.Namespace, lengths: list[int]) -> tuple[list[int], str]:
    """The measured tokens, a whole number of the longest windows, and the text before them."""
    tokenizer = load_tokenizer(ModelArguments(str(args.model)))
    text, longest = args.text.read_text(encoding="utf-8"), max(lengths)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    share = 1 if args.train_text else 2  # half of the text is left to train on
    windows = min(args.windows, len(ids) // share // longest)
    if windows < 1:
        sys.exit(f"error: --text {args.text}: {len(ids)} tokens are too few for windows of {longest} ({share} needed)")
    measured = windows * longest
    return ids[-measured:], text[: offsets[-measured][0]]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: list[int], length: int) -> tuple[float, float]:
    """Perplexity over all tokens of windows of `length` that have one before them, and seconds."""
    device = next(model.parameters()).device
    total, count, began = 0.0, 0, time.time()
    for start in range(0, len(ids), length):
        row = torch.tensor([ids[start : start + length]], device=device)
        hidden = model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
        for first in range(0, len(hidden), CHUNK):
            logits = model.get_output_embeddings()(hidden[first : first + CHUNK]).float()
            total += F.cross_entropy(logits, row[0, first + 1 : first + 1 + len(logits)], reduction="sum").item()
            count += len(logits)
    return math.exp(total / count), time.time() - began


def measure(name: str, args: argparse.Namespace, model: Path, ids: list[int], lengths: list[int], **flags) -> dict:
    """One row of the table."""
    arguments = ModelArguments(str(model), torch_dtype=args.torch_dtype, flash_attn=True, **flags)
    loaded = load_causal_lm(arguments, for_training=False).to("cuda" if torch.cuda.is_available() else "cpu")
    row, seconds = {"model": name}, 0.0
    for length in sorted(lengths):  # upwards: dynamic scaling keeps the frequencies of the longest row it has seen
        row[str(length)], took = perplexity(loaded, ids, length)
        seconds += took
    row["s"] = seconds
    print(f"{name}: {row}", file=sys.stderr, flush=True)
    return row


def run(words: list[str]) -> None:
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)}\n{done.stdout[-4000:]}")


def train(args: argparse.Namespace, length: int, text: Path) -> tuple[Path, float]:
    """Linear scaling for `length` tokens and a short LoRA training there; the merged model and its seconds."""
    out, began = args.output_dir / f"linear-{length}", time.time()
    words = [sys.executable, "pretraining.py", "--model_name_or_path", str(args.model), "--output_dir", str(out)]
    words += ["--train_file_dir", str(text), "--block_size", str(length), "--rope_scaling", "linear"]
    words += ["--max_steps", str(args.steps), "--per_device_train_batch_size", "1", "--gradient_accumulation_steps"]
    words += [str(max(1, args.tokens_a_step // length)), "--learning_rate", str(args.learning_rate)]
    words += ["--lora_rank", str(args.lora_rank), "--lora_dropout", "0", "--warmup_steps", "0.1"]
    words += ["--gradient_checkpointing", "--flash_attn", "True", "--save_strategy", "no", "--report_to", "none"]
    words += ["--torch_dtype", args.torch_dtype, "--overwrite_output_dir", "True"]
    words += ["--bf16"] if torch.cuda.is_available() else []
    run(words + (["--shift_attn", "True"] if args.shift_attn else []))
    merged = args.output_dir / f"linear-{length}-merged"
    words = [sys.executable, "merge_peft_adapter.py", "--base_model", str(args.model), "--lora_model", str(out)]
    run([*words, "--output_dir", str(merged), "--overwrite_output_dir", "True"])
    return merged, time.time() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; its end is measured")
    parser.add_argument("--train_text", type=Path, help="file or folder to train on; default: what stands before")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--windows", type=int, default=4, help="of the longest length")
    parser.add_argument("--train_lengths", help="of --lengths; default: all beyond the model's own context")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps at each length; 0: no training")
    parser.add_argument("--tokens_a_step", type=int, default=65536)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--torch_dtype", default="bfloat16")
    parser.add_argument("--shift_attn", action="store_true", help="train with shifted sparse attention")
    args = parser.parse_args(argv)
    args.model, args.output_dir = args.model.resolve(), args.output_dir.resolve()
    lengths = [int(length) for length in args.lengths.split(",")]
    ids, before = split_text(args, lengths)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = (args.train_text or args.output_dir / "train.txt").resolve()
    if not args.train_text:
        text.write_text(before, encoding="utf-8")
    context = context_of(load_config(ModelArguments(str(args.model))))
    factor = max(lengths) / context
    beyond = [length for length in lengths if length > context]
    trained = [int(length) for length in args.train_lengths.split(",")] if args.train_lengths else beyond
    if wrong := [length for length in trained if length not in beyond]:
        sys.exit(f"error: --train_lengths: {wrong} are not of --lengths {args.lengths} or within the own {context}")
    rows = [measure("as it is", args, args.model, ids, lengths)]
    for kind in ("dynamic", "yarn", "linear") if factor > 1 else ():
        name = f"{kind}, factor {factor:g}, no training"
        rows.append(measure(name, args, args.model, ids, lengths, rope_scaling=kind, rope_factor=factor))
    for length in trained if args.steps > 0 else ():
        merged, seconds = train(args, length, text)
        name = f"linear, factor {length / context:g}, {args.steps} steps at {length} ({seconds:.0f} s)"
        rows.append(measure(name, args, merged, ids, lengths))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.model.name}, own context {context}, {len(ids)} tokens of {args.text.name}, {device}\n")
    print("| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()) + " |")


if __name__ == "__main__":
    main()
