"""How fast records become rows of token ids, beside LLaMA-Factory and the tokenizer alone.

    python benchmarks/data.py --data sharegpt.json --model models/SmolLM2-135M-Instruct --output_dir outputs/data
    python benchmarks/data.py … --llama_factory_python path/to/its/bin/python --llama_factory_template smollm2
    python benchmarks/data.py … --stage pt

FILE is ShareGPT conversations (.json, .jsonl, or a wheel or zip that holds one such file); what is whole in it is
written to a .jsonl file first, which all sides read. Each side is a process of its own, one after the other; its clock
starts when the tokenizer and the template are there and nothing of the file was read. Prints a Markdown table:

- stagewise: read, parse, render, encode, cut, pack into rows, with an empty cache folder; then the same once more
- LLaMA-Factory: its `get_dataset`, with two worker processes and an empty cache, no packing; conversations only
- encode_batch: the tokenizer alone, on the text that stagewise kept

--stage pt makes a text of each conversation, what is said in it behind each other; --stage rm a pair: its last answer
and, as the rejected one, that of the conversation before. Pairs are not packed.

Memory is the peak of all the processes of a side, what they share counted once, above what was in use when the clock
started; files that are only mapped count as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2


# --- the sides, each in a process of its own -------------------------------------------------------------------------


def stagewise(args: argparse.Namespace) -> dict[str, object]:
    """Flags → packed rows, or pairs, the way the stage's script does it."""
    sys.path.insert(0, str(ROOT))
    from stagewise.config.arguments import (
        AdapterArguments,
        ChatArguments,
        DataArguments,
        LanguageModelArguments,
        ModelArguments,
        PairArguments,
    )
    from stagewise.data.packing import PackedRows
    from stagewise.models.tokenizer import load_tokenizer

    model = ModelArguments(model_name_or_path=args.model, cache_dir=str(args.output_dir / "cache"))
    data = DataArguments(train_file_dir=str(args.file), on_bad_record="skip")
    chat = ChatArguments(template_name=args.template_name)
    stage = argparse.Namespace(
        output_dir=str(args.output_dir), seed=42, data_seed=None, do_train=True, do_eval=False, dry_run=False
    )
    rows, adapter = LanguageModelArguments(), AdapterArguments()
    if args.stage == "pt":
        import pretraining as script

        parts = rows, adapter, script.PTArguments(block_size=args.cutoff)
    elif args.stage == "rm":
        import reward_modeling as script

        parts = chat, PairArguments(max_source_length=args.cutoff // 2, max_target_length=args.cutoff // 2), adapter
    else:
        import supervised_finetuning as script

        parts = chat, rows, adapter, script.SFTArguments(model_max_length=args.cutoff)
    load_tokenizer(model)  # what is loaded lazily is loaded now
    started = start_clock()
    splits, tokenizer, *_ = script.read_data(stage, model, data, *parts)
    if args.stage != "rm":
        PackedRows(splits.train, args.cutoff)
    found = {**started(), "tokens": int(splits.train.tokens.sum())}
    account = splits.accounts["train"]
    if args.write_kept:
        with open(args.write_kept, "w", encoding="utf-8") as file:
            for item in splits.train:
                for example in (item.chosen, item.rejected) if args.stage == "rm" else (item,):
                    file.write(json.dumps(tokenizer.decode(example.input_ids)) + "\n")
    return {**found, "read": account.read, "kept": account.kept, "cut": account.cut}


def encode_batch(args: argparse.Namespace) -> dict[str, object]:
    """The tokenizer on texts in memory, its own threads on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    texts = [json.loads(line) for line in lines(args.file)]
    tokenizer.encode_batch(["a"] * 8)
    started = start_clock()
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    found = started()
    return {**found, **({"kept": len(texts)} if args.stage == "sft" else {}), "tokens": sum(map(len, encoded))}


def llama_factory(args: argparse.Namespace) -> dict[str, object]:
    """LLaMA-Factory's way from a file to examples."""
    os.environ.update(DISABLE_VERSION_CHECK="1", HF_HUB_OFFLINE="1")
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    folder = args.output_dir / "llama_factory"
    folder.mkdir(parents=True, exist_ok=True)
    info = {"file_name": str(args.file.resolve()), "formatting": "sharegpt"}
    (folder / "dataset_info.json").write_text(json.dumps({"conversations": info}))
    flags = {
        "model_name_or_path": args.model,
        "stage": "sft",
        "do_train": True,
        "use_cpu": True,
        "dataset": "conversations",
        "dataset_dir": str(folder),
        "template": args.llama_factory_template,
        "cutoff_len": args.cutoff,
        "preprocessing_num_workers": WORKERS,
        "overwrite_cache": True,
        "output_dir": str(folder / "out"),
        "report_to": "none",
    }
    model, data, training, *_ = get_train_args(flags)
    tokenizer = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
    started = start_clock()
    examples = get_dataset(template, model, data, training, stage="sft", **tokenizer)["train_dataset"]
    found = started()
    return {
        **found,
        "read": sum(1 for _ in lines(args.file)),
        "kept": len(examples),
        "tokens": sum(map(len, examples["input_ids"])),
    }


SIDES = {side.__name__: side for side in (stagewise, encode_batch, llama_factory)}


# --- clock and memory ------------------------------------------------------------------------------------------------


def start_clock():
    """Starts the clock and the watch over memory; calling what is returned stops both."""
    before, peak, done = proportional_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], proportional_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, used = time.perf_counter(), sum(os.times()[:4])

    def stop() -> dict[str, float]:
        seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - used  # with the children that have ended
        done.set()
        watcher.join()
        return {"seconds": seconds, "cpu": cpu, "memory": max(peak[0], proportional_memory()) - before}

    return stop


def proportional_memory() -> int:
    """Bytes of this process and its children, what several of them share counted once."""
    total, me = 0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            total += process.memory_full_info().pss
    return total


# --- what all sides read ---------------------------------------------------------------------------------------------


def whole_records(path: Path) -> Iterator[dict[str, object]]:
    """The JSON objects of a list or of lines, up to where the text breaks off."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
            text = archive.read(max(names, key=lambda name: archive.getinfo(name).file_size)).decode("utf-8", "ignore")
    else:
        text = path.read_bytes().decode("utf-8", "ignore")
    decoder, position = json.JSONDecoder(), 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,[]":
            position += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except ValueError:
            return
        yield record


def lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file


def records_of(stage: str, path: Path) -> Iterator[dict[str, object]]:
    """The file's conversations, or the texts or pairs that are made of them."""
    before = None
    for record in whole_records(path):
        turns = record.get("conversations") or []
        said = [turn["value"] for turn in turns]
        if stage == "sft":
            yield record
        elif stage == "pt":
            if any(map(str.strip, said)):
                yield {"text": "\n\n".join(said)}
        elif len(turns) > 1 and turns[0]["from"] == "human" and turns[-1]["from"] == "gpt" and said[-1].strip():
            if before is not None:
                yield {"conversations": turns[:-1], "chosen": said[-1], "rejected": before}
            before = said[-1]


def write_records(stage: str, path: Path, file: Path, times: int) -> int:
    count = 0
    with open(file, "w", encoding="utf-8") as out:
        for _ in range(times):
            for record in records_of(stage, path):
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    return count


# --- the table -------------------------------------------------------------------------------------------------------


def measure(side: str, args: argparse.Namespace, file: Path, python: str = sys.executable, *more: str) -> dict:
    words = [python, __file__, "--side", side, "--data", str(file), "--output_dir", str(args.output_dir)]
    words += ["--model", str(args.model), "--cutoff", str(args.cutoff), "--stage", args.stage]
    words += ["--template_name", args.template_name] if args.template_name else []
    words += ["--llama_factory_template", args.llama_factory_template, *more]
    home = args.output_dir / "hf_home"
    shutil.rmtree(home, ignore_errors=True)  # a cold cache of `datasets`
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[tuple[str, dict]]) -> str:
    text = ["| | records read | kept | tokens kept | s | CPU s | tokens per second | MB |", "|---|" + 7 * "---:|"]
    for name, found in rows:
        read, kept = (f"{found[key]:,}" if key in found else "" for key in ("read", "kept"))
        speed = found["tokens"] / found["seconds"]
        text.append(
            f"| {name} | {read} | {kept} | {found['tokens']:,} | {found['seconds']:.1f} "
            f"| {found['cpu']:.1f} | {speed:,.0f} | {found['memory'] / 1e6:,.0f} |"
        )
    return "\n".join(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="directory of the tokenizer")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/data"))
    parser.add_argument("--stage", choices=("sft", "pt", "rm"), default="sft")
    parser.add_argument("--cutoff", type=int, default=2048, help="tokens of a row; of a pair's prompt and answer half")
    parser.add_argument("--template_name", help="stagewise's; the tokenizer's own where it is left out")
    parser.add_argument("--llama_factory_python", help="the python that LLaMA-Factory is installed for")
    parser.add_argument("--llama_factory_template", default="smollm2")
    parser.add_argument("--twice", action="store_true", help="also with the file twice over, to see how memory grows")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--write_kept", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama_factory_python and args.stage != "sft":
        parser.error("--llama_factory_python: beside conversations only, leave out --stage")
    return args


def main() -> None:
    args = parse_arguments()
    if args.side:
        args.file = args.data
        print(json.dumps(SIDES[args.side](args)))
        return
    shutil.rmtree(args.output_dir / "cache", ignore_errors=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file, kept = args.output_dir / f"{args.stage}.jsonl", args.output_dir / "kept.jsonl"
    print(
        f"{write_records(args.stage, args.data, file, 1):,} whole records, {file.stat().st_size / 1e6:.0f} MB",
        flush=True,
    )
    rows = [("stagewise", measure("stagewise", args, file, sys.executable, "--write_kept", str(kept)))]
    rows.append(("stagewise, second start", measure("stagewise", args, file)))
    rows.append(("encode_batch alone", measure("encode_batch", args, kept)))
    if args.llama_factory_python:
        rows.append(("LLaMA-Factory", measure("llama_factory", args, file, args.llama_factory_python)))
    if args.twice:
        double = args.output_dir / "twice.jsonl"
        write_records(args.stage, args.data, double, 2)
        rows.append(("stagewise, the file twice over", measure("stagewise", args, double)))
    print(table(rows))


if __name__ == "__main__":
    main()
