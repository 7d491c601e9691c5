"""The same stage on one process, on several, and under DeepSpeed: do the losses agree, what does each take?

    python benchmarks/devices.py --output_dir outputs/devices --stages sft,rm --launchers one,ddp,zero2,zero3

Each run takes the same few steps with the same records in every step (the batch a process is divided by the number of
processes), without dropout. The model is a random one of a real shape with the small model's tokenizer, or --model.
Prints a Markdown table: the first and last step's loss, seconds a step (the slow first one counted in), GPU memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "dpo": "dpo_training.py",
    "ppo": "ppo_training.py",
}
DATA = {"pt": "pretrain", "sft": "finetune", "rm": "reward", "dpo": "reward", "ppo": "finetune"}
LENGTHS = {"pt": ["--block_size", "1024"], "sft": ["--model_max_length", "1024"]}
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
STEPS = 6


def make_model(tokenizer_dir: Path, folder: Path, score: bool) -> Path:
    """A random Llama of 1.2 billion parameters in bfloat16 (or a reward model of that shape), with a tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        **SHAPE, **special, num_key_value_heads=8, vocab_size=49152, pad_token_id=tokenizer.pad_token_id, num_labels=1
    )
    torch.manual_seed(0)
    auto = LlamaForSequenceClassification if score else LlamaForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = auto(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(
    stage: str, launcher: str, processes: int, model: Path, out: Path, full: bool, more: list[str]
) -> list[str]:
    data = ROOT / "data" / DATA[stage]
    several = processes if launcher != "one" else 1
    batch = max(1, 4 // several)
    words = [sys.executable]
    if several > 1 or launcher.startswith("zero"):
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(several)]
    words += [str(ROOT / SCRIPTS[stage]), "--model_name_or_path", str(model), "--output_dir", str(out)]
    words += ["--train_file_dir", str(data / "train"), "--per_device_train_batch_size", str(batch)]
    words += ["--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    words += ["--overwrite_output_dir", "--bf16", *LENGTHS.get(stage, [])]
    words += ["--use_peft", "False", "--learning_rate", "1e-5"] if full else ["--lora_dropout", "0"]
    words += ["--deepspeed", str(ROOT / f"{launcher}.json")] if launcher.startswith("zero") else []
    if stage == "ppo":
        words += ["--batch_size", str(batch * 2), "--mini_batch_size", str(batch), "--ppo_epochs", "1"]
        words += ["--max_target_length", "64"]
    return words + more


def measure(words: list[str], out: Path) -> dict[str, str]:
    began = time.time()
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(" ".join(words), done.stdout[-3000:], file=sys.stderr)
        return {
            "first loss": f"exit code {done.returncode}",
            "last loss": "",
            "s a step": "",
            "GPU GiB": "",
            "wall s": "",
        }
    manifest = json.loads((out / "run.json").read_text())
    logs = [log for log in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    return {
        "first loss": f"{logs[0]['loss']:.4f}",
        "last loss": f"{logs[-1]['loss']:.4f}",
        "s a step": f"{manifest['metrics']['train']['train_runtime'] / STEPS:.2f}",
        "GPU GiB": f"{manifest.get('peak_gpu_memory_gib', 0):.1f}",
        "wall s": f"{time.time() - began:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="in place of a random one")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stages", default="pt,sft,rm,dpo")
    parser.add_argument("--launchers", default="one,ddp,zero2,zero3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="train all weights")
    args = parser.parse_args()
    stages = args.stages.split(",")
    model = args.model or make_model(args.tokenizer, args.output_dir / "model", score=False)
    more = {stage: [] for stage in stages}
    if "ppo" in stages:
        reward = make_model(args.tokenizer, args.output_dir / "reward", score=True)
        more["ppo"] = ["--reward_model_name_or_path", str(reward)]
    rows = []
    for stage in stages:
        for launcher in args.launchers.split(","):
            out = args.output_dir / f"{stage}-{launcher}{'-full' if args.full else ''}"
            words = command(stage, launcher, args.processes, model, out, args.full, more[stage])
            rows.append(
                {"stage": stage, "run": launcher, "trains": "all" if args.full else "LoRA", **measure(words, out)}
            )
            print(rows[-1], file=sys.stderr, flush=True)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
