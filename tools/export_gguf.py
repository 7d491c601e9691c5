"""Exports a merged model as a GGUF file, for llama.cpp and programs based on it (Ollama, LM Studio …).

    python -m tools.export_gguf --model_name_or_path outputs/sft-merged --output_file outputs/sft.gguf
    python -m tools.export_gguf --model_name_or_path outputs/sft-merged --output_file outputs/sft.gguf --outtype q8_0
    python -m tools.export_gguf --fetch_converter      # only brings llama.cpp's script

llama.cpp's own script converts the model: it comes from the sources of the package `llama-cpp-python`, which pip
downloads once (75 MB, checked by sha256) into --converter_dir. The end token of the file is then set to the end marker
of generation_config.json, and chat template, end marker and vocabulary are compared with the model's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from stagewise.artifacts.file_hashes import sha256_of
from stagewise.artifacts.json_files import read_object
from stagewise.artifacts.weight_files import AGAIN, check_hashes, check_weight_files
from stagewise.config.paths import path_of
from stagewise.errors import ArgumentError
from stagewise.reports.terminal_text import print_error

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER_DIR = "models/llama.cpp"
SCRIPT = "convert_hf_to_gguf.py"
TAKEN = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/")  # of vendor/llama.cpp
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")


class ExportError(RuntimeError):
    """A failed export; the message says what to do."""


def check_model(folder: Path) -> dict:
    """The model's config.json.

    Raises:
        ExportError: for an adapter, a reward model, a quantized model, or a folder without a model.
    """
    flag = f"--model_name_or_path {folder}"
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"{flag}: an adapter; merge it first: python merge_peft_adapter.py --lora_model {folder} --output_dir "
            f"{folder}-merged"
        )
    if not (folder / "config.json").is_file():
        raise ExportError(f"{flag}: expected a directory with config.json; download a hub model first")
    config = read_object(folder / "config.json", AGAIN)
    if any("SequenceClassification" in name for name in config.get("architectures") or []):
        raise ExportError(f"{flag}: a reward model; a GGUF file here holds a language model")
    if config.get("quantization_config"):
        raise ExportError(f"{flag}: is quantized already; give the model in 16 or 32 bit, and --outtype q8_0")
    return config


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=path_of, help="Directory of a merged model.")
    parser.add_argument("--output_file", type=path_of, help="The GGUF file that is written.")
    parser.add_argument("--fetch_converter", action="store_true", help="Only fetch llama.cpp's script, and stop.")
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="Precision; auto: as the model's own.")
    parser.add_argument("--converter_dir", type=path_of, default=Path(CONVERTER_DIR), help=f"default: {CONVERTER_DIR}")
    parser.add_argument("--overwrite", action="store_true", help="Replace --output_file.")
    args = parser.parse_args(argv)
    if args.fetch_converter == bool(args.model_name_or_path or args.output_file):
        parser.error("give --model_name_or_path and --output_file, or --fetch_converter alone")
    if not args.fetch_converter and not (args.model_name_or_path and args.output_file):
        parser.error("--model_name_or_path and --output_file belong together")
    return args


if __name__ == "__main__":  # a wrong flag or model is answered before transformers has loaded
    given = read_arguments()
    if not given.fetch_converter:
        try:
            check_model(given.model_name_or_path)
        except (ExportError, ArgumentError) as error:
            print_error(error)
            sys.exit(1)

from gguf import GGUFReader
from transformers import PreTrainedTokenizerBase

from stagewise.models.tokenizer import open_tokenizer

# ── the converter ───────────────────────────────────────────────────────────────────────────────────────────────────


def fetch_converter(folder: Path) -> Path:
    """llama.cpp's conversion script, downloaded if it is missing.

    Raises:
        ExportError: if pip cannot download the sources, or they are not the tested ones.
    """
    if (folder / SCRIPT).is_file():
        return folder / SCRIPT
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        source = download(Path(temporary))
        made = Path(temporary, "made")
        unpack(source, made)
        shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SCRIPT))
        os.replace(made / SCRIPT, folder / SCRIPT)  # last: where it is, the rest is
    return folder / SCRIPT


def download(folder: Path) -> Path:
    """Downloads the package's sources with pip into `folder`."""
    name = PACKAGE.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--no-binary", name, "--dest", folder]
    if subprocess.run([str(word) for word in command], stdout=sys.stderr).returncode != 0:
        raise ExportError(f"pip could not download {PACKAGE} (its own words are above). Check the network")
    (source,) = folder.glob("*.tar.gz")
    if (digest := sha256_of(source)) != SHA256:
        raise ExportError(f"{source.name}: sha256 is {digest}, expected {SHA256}; it was not opened")
    return source


def unpack(source: Path, folder: Path) -> None:
    """Extracts the conversion script and its imports from the sources."""
    with tarfile.open(source) as archive:
        for member in archive:
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            if found and member.isfile() and name.startswith(TAKEN):
                member.name = name
                # Python 3.11 has the filter from 3.11.4 on. The archive's hash is known, and its links are not taken.
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                archive.extract(member, folder, **safe)


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def convert(script: Path, model: Path, output: Path, outtype: str) -> None:
    """Runs llama.cpp's script without access to the hub.

    Raises:
        ExportError: with the last line of the script's output.
    """
    command = [sys.executable, str(script), str(model), "--outfile", str(output), "--outtype", outtype]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        output.unlink(missing_ok=True)
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ExportError(f"llama.cpp's script cannot convert {model}: {said[-1] if said else 'it said nothing'}")


def end_of(model: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends the model's answers: the first one in generation_config.json, else the tokenizer's.

    Raises:
        ExportError: if there is none.
    """
    ends = None
    if (model / "generation_config.json").is_file():
        ends = read_object(model / "generation_config.json", AGAIN).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    end = tokenizer.eos_token_id if ends[0] is None else ends[0]
    if end is None:
        raise ExportError(f"--model_name_or_path {model}: neither generation_config.json nor the tokenizer has an end")
    return end


def settle_end(output: Path, end: int) -> None:
    """Writes the end id into the file, in place."""
    reader = GGUFReader(output, "r+")
    field = reader.get_field("tokenizer.ggml.eos_token_id")
    if field is None:
        raise ExportError(f"{output}: the file has no end token; llama.cpp would never stop")
    field.parts[field.data[0]][0] = end


def compare(output: Path, tokenizer: PreTrainedTokenizerBase, end: int) -> None:
    """Raises ExportError if file and tokenizer differ in chat template, end marker or vocabulary."""
    reader = GGUFReader(output)

    def value(key: str):
        field = reader.get_field(key)
        return None if field is None else field.contents()

    tokens = value("tokenizer.ggml.tokens") or []
    differing = [
        name
        for name, found, expected in (
            ("chat template", value("tokenizer.chat_template"), tokenizer.chat_template),
            ("end marker", value("tokenizer.ggml.eos_token_id"), end),
            (
                "text of the end marker",
                tokens[end] if end < len(tokens) else None,
                tokenizer.convert_ids_to_tokens(end),
            ),
        )
        if found != expected
    ]
    if len(tokens) < len(tokenizer):
        differing.append("vocabulary")
    if differing:
        raise ExportError(f"{output}: differs from the model in: {', '.join(differing)}")


def export(model: Path, output: Path, outtype: str, converter_dir: Path, overwrite: bool) -> None:
    """Writes `model` to `output`, which appears once it is complete and has been compared."""
    check_model(model)
    if output.exists() and not overwrite:
        raise ExportError(f"--output_file {output}: is there already; add --overwrite, or give another name")
    check_weight_files(model)
    check_hashes(model)
    tokenizer = open_tokenizer(str(model), "model_name_or_path", {"local_files_only": True})
    end = end_of(model, tokenizer)
    script = fetch_converter(converter_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".unfinished-{output.name}")
    try:
        convert(script, model, unfinished, outtype)
        settle_end(unfinished, end)
        compare(unfinished, tokenizer, end)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    told = f"answers end at {tokenizer.convert_ids_to_tokens(end)!r} (id {end})"
    print(f"{output}: {output.stat().st_size / 2**20:.0f} MiB, {outtype}; {told}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    try:
        if args.fetch_converter:
            print(f"llama.cpp's script: {fetch_converter(args.converter_dir)}", file=sys.stderr)
            return
        export(args.model_name_or_path, args.output_file, args.outtype, args.converter_dir, args.overwrite)
    except (ExportError, ArgumentError) as error:
        print_error(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
