"""Does a longer vocabulary pay? Bits per character on held-out text after the same short PT, with and without it.

    python benchmarks/vocabulary.py --text fever_zh.txt --output_dir outputs/vocabularies
    python benchmarks/vocabulary.py --text fever_zh.txt --output_dir outputs/vocabularies --vocab_size 2000,4000

The last tenth of the text is held out. A vocabulary is built from the rest and added to the model; then both models
are trained on that rest, and on --more_text, by `pretraining.py` with the same flags: with the same number of steps,
which is the same compute, and with the same number of passes over the text, which is less. Flags that are not this
script's go to `pretraining.py`. Prints a Markdown table.

Bits per character, -log2 p(text) / characters, count every character of the held-out text and so compare models with
different tokenizers. The text is cut into windows of --window characters, each behind the end token alone.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMALL_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
HEAD = ("vocabulary", "trained", "tokens a character", "steps", "passes", "bits a character", "s")


@dataclass
class Settings:
    """What a device gets unless flags say otherwise; None: the whole text."""

    max_steps: int
    batch_size: int
    block_size: int
    held_out: int | None
    window: int


DEFAULTS = {"cuda": Settings(60, 8, 512, None, 512), "cpu": Settings(12, 1, 256, 2048, 256)}


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """The first nine tenths of a text, up to a line's end, and the rest, as files in a folder each."""
    content = text.read_text(encoding="utf-8")
    cut = content.index("\n", int(0.9 * len(content))) + 1
    parts = folder / "train" / "text.txt", folder / "held_out" / "text.txt"
    for path, part in zip(parts, (content[:cut], content[cut:]), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(part, encoding="utf-8")
    return parts


def run(*words: object) -> None:
    """Starts a script of this project; its own words are shown if it fails."""
    command = [sys.executable, *map(str, words)]
    print("$", " ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nerror: exit code {done.returncode}: {' '.join(command)}")


def extend(model: Path, train_file: Path, vocab_size: str, out: Path) -> Path:
    """Builds a vocabulary from the text and adds it to the model; returns the extended model's directory."""
    vocabulary, extended = out / f"vocabulary-{vocab_size}", out / f"extended-{vocab_size}"
    source = ["--text_dir", train_file, "--vocab_size", vocab_size]
    run("-m", "tools.build_tokenizer", *source, "--output_dir", vocabulary, "--overwrite_output_dir")
    source = ["--model_name_or_path", model, "--vocabulary", vocabulary]
    run("-m", "tools.extend_vocabulary", *source, "--output_dir", extended, "--overwrite_output_dir")
    return extended


def train(model: Path, out: Path, train_file: Path, words: list[str]) -> tuple[int, float]:
    """PT of an adapter with embedding and head; returns steps and passes over the text."""
    words = ["--train_file_dir", train_file.parent, "--modules_to_save", "embed_tokens,lm_head", *words]
    words += ["--save_strategy", "no", "--report_to", "none", "--overwrite_output_dir"]
    run("pretraining.py", "--model_name_or_path", model, "--output_dir", out, *words)
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"], state["epoch"]


def measure(model: Path, adapter: Path | None, text: str, window: int, device: str) -> tuple[float, float]:
    """(tokens / characters, -log2 p(text) / characters) of a model in float32, with an adapter on it or without."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stagewise.adapters.attach import load_adapter

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    network = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype=torch.float32)
    network = (network if adapter is None else load_adapter(network, adapter)).to(device).eval()
    nll, tokens = 0.0, 0
    for start in range(0, len(text), window):
        ids = tokenizer(text[start : start + window], add_special_tokens=False)["input_ids"]
        row = torch.tensor([[tokenizer.eos_token_id, *ids]], device=device)
        with torch.no_grad():
            logits = network(input_ids=row, use_cache=False).logits[0, :-1].float()
        nll += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        tokens += len(ids)
    return tokens / len(text), nll / math.log(2) / len(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", type=Path, required=True, help="a .txt file")
    parser.add_argument("--more_text", type=Path, nargs="+", default=[], help=".txt files that PT reads as well")
    parser.add_argument("--copies", type=int, default=1, help="times that PT reads --text for each of --more_text")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SMALL_MODEL)
    parser.add_argument("--vocab_size", default="4000", help="of the vocabulary that is built; several by commas")
    parser.add_argument("--learning_rate", default="5e-4")
    for setting in fields(Settings):
        gpu, cpu = (getattr(DEFAULTS[device], setting.name) or "all" for device in ("cuda", "cpu"))
        parser.add_argument(f"--{setting.name}", type=int, help=f"default: {gpu} on a GPU, {cpu} on a CPU")
    args, flags = parser.parse_known_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = DEFAULTS[device]
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    settings = Settings(**{**vars(own), **given})
    out = args.output_dir.resolve()
    train_file, held_file = split(args.text, out)
    held_out = held_file.read_text(encoding="utf-8")[: settings.held_out]
    for earlier in train_file.parent.glob("more-*.txt"):
        earlier.unlink()
    for number, path in enumerate([*[train_file] * (args.copies - 1), *args.more_text]):
        shutil.copy(path, train_file.with_name(f"more-{number}.txt"))
    models = {"the model's own": args.model.resolve()}
    models |= {f"+ {size} built": extend(args.model, train_file, size, out) for size in args.vocab_size.split(",")}
    words = ["--learning_rate", args.learning_rate, "--block_size", str(settings.block_size)]
    words += [
        "--per_device_train_batch_size",
        str(settings.batch_size),
        *(["--bf16"] if device == "cuda" else ["--use_cpu"]),
        *flags,
    ]
    rows: list[tuple[str, ...]] = []

    def note(name: str, how: str, model: Path, adapter: Path | None, steps: int, passes: float, began: float) -> None:
        length, bits = measure(model, adapter, held_out, settings.window, device)
        seconds = f"{time.time() - began:.0f}"
        rows.append((name, how, f"{length:.3f}", str(steps), f"{passes:.2f}", f"{bits:.3f}", seconds))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)

    for name, model in models.items():
        note(name, "no", model, None, 0, 0.0, time.time())
    first_passes = 0.0
    for number, (name, model) in enumerate(models.items()):
        for by in ("steps", "passes") if number else ("steps",):
            much = ["--max_steps", str(settings.max_steps)]
            much = much if by == "steps" else ["--num_train_epochs", str(first_passes)]
            adapter, began = out / f"pt-{number}-{by}", time.time()
            steps, passes = train(model, adapter, train_file, [*words, *much])
            first_passes = passes if number == 0 else first_passes
            note(name, f"same {by}" if number else "yes", model, adapter, steps, passes, began)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    size = f"{settings.batch_size} x {settings.block_size} tokens a step"
    print(f"\n{where}, {len(held_out):,} held-out characters, {size}, learning rate {args.learning_rate}\n")
    print("| " + " | ".join(HEAD) + " |\n|---|---|" + "---:|" * (len(HEAD) - 2))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
