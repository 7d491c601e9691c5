"""What training costs on one GPU: peak memory and tokens a second of published shapes, with the estimate beside them.

    python benchmarks/memory.py --shapes 0.5B,1.5B,8B --methods lora,qlora8,qlora4 --output memory.jsonl
    python benchmarks/memory.py --cells 32B:qlora4,8x7B:qlora4_experts --output memory.jsonl
    python benchmarks/memory.py --dry_run --gpu_gib 80         # what would fit, without a GPU
    python benchmarks/memory.py --table memory.jsonl           # the table of what has been measured

Each cell is a process of its own with a time limit: a model of the shape with random weights is made on the GPU, layer
by layer (quantised as it is made), and takes a few steps of supervised finetuning through the stage's own trainer on
one row of --tokens random tokens. What the estimate of stagewise/memory.py says cannot fit is skipped, saying so. Each
row is told and kept as it is finished; the table, in Markdown, is printed last. Peak: torch.cuda.max_memory_allocated
of the steps, without the CUDA context. methods: full (weights in float32, computed in bfloat16, as the stages do),
full16 (in bfloat16), lora, qlora8, qlora4 (bitsandbytes int8 and nf4 with double quantisation), qlora4_experts
(experts in nf4, too), qlora4_all (and the adapter on them).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
# Qwen2.5-0.5B, -1.5B, -14B, -32B, Llama-3.1-8B and Mixtral-8x7B-v0.1 as published; the tiny ones try the script out.
SHAPES = {
    "0.5B": {**QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    }
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
    | {"max_position_embeddings": 131072, "tie_word_embeddings": False},
    "14B": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
    }
    | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
    }
    | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "8x7B": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rope_theta": 1000000.0}
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False, "sliding_window": None},
    "tiny": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320},
    "tiny_moe": {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "num_local_experts": 4},
}
PUBLISHED = ("0.5B", "1.5B", "8B", "14B", "32B", "8x7B")
METHODS = ("full", "full16", "lora", "qlora8", "qlora4", "qlora4_experts", "qlora4_all")
EXPERTS_IN_4_BIT = ("qlora4_experts", "qlora4_all")
ATTENTION_LAYERS = "q_proj,k_proj,v_proj,o_proj"  # what the adapter takes of experts' models, but for qlora4_all
COLUMNS = ("shape", "method", "weights GiB", "peak GiB", "estimate GiB", "estimate / peak", "tokens/s", "remark")
WARM_UP = 2
CONTEXT = 0.6 * 2**30  # the CUDA context, and what the allocator cannot use
MARGIN = 1.03


# ── one cell, in its own process ────────────────────────────────────────────────────────────────────────────────────


def make_config(shape: str):
    """The config of a published shape."""
    from transformers import AutoConfig

    values = dict(SHAPES[shape])
    theta = values.pop("rope_theta", None)
    if theta:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(values.pop("model_type"), **values, **ids)


def bits_of(method: str) -> int | None:
    return {"qlora8": 8, "qlora4": 4, "qlora4_experts": 4, "qlora4_all": 4}.get(method)


def adapter_arguments(shape: str, method: str):
    from stagewise.arguments import AdapterArguments

    attention = "num_local_experts" in SHAPES[shape] and method != "qlora4_all"
    return AdapterArguments(target_modules=ATTENTION_LAYERS if attention else "all")


def predicted(cell: argparse.Namespace):
    """The estimate for a cell."""
    import torch
    from transformers import AutoModelForCausalLM

    from stagewise import memory
    from stagewise.adapter import attach_adapter
    from stagewise.layers import skeleton

    config = make_config(cell.shape)
    dtype = torch.float32 if cell.method == "full" else torch.bfloat16
    model = skeleton(config, AutoModelForCausalLM, dtype)
    in_bits = memory.layers_in_bits(model) if bits_of(cell.method) else set()
    if not cell.method.startswith("full"):
        model = attach_adapter(model, adapter_arguments(cell.shape, cell.method), "CAUSAL_LM")
    step = memory.Step(
        rows=1,
        tokens=cell.tokens,
        logit_tokens=cell.tokens,
        autocast=True,
        checkpointing=cell.checkpointing,
        optim=cell.optim,
        bits=bits_of(cell.method),
        experts_in_bits=cell.method in EXPERTS_IN_4_BIT,
    )
    return memory.estimate(model, step, in_bits)


def random_model(cell: argparse.Namespace, device):
    """The shape with random weights, made on the device one weight at a time and quantised at once.

    At no time does more than one layer's weight stand there in 16 bit beside what is kept.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from stagewise.arguments import ModelArguments
    from stagewise.attention import choose_attention
    from stagewise.layers import skeleton

    config = make_config(cell.shape)
    dtype = torch.float32 if cell.method == "full" else torch.bfloat16
    model = skeleton(config, AutoModelForCausalLM, dtype)
    arguments = ModelArguments("random", torch_dtype=str(dtype).removeprefix("torch."), flash_attn=cell.flash_attn)
    model.set_attn_implementation(choose_attention(config, arguments))
    bits = bits_of(cell.method)
    in_bits = prepare_layers(model, bits, dtype) if bits else {}
    made: dict[int, nn.Parameter] = {}
    torch.manual_seed(0)
    for path, module in list(model.named_modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in made:
                value = torch.empty(empty.shape, dtype=dtype, device=device)
                norm = "norm" in type(module).__name__.lower()
                value = value.fill_(1.0) if norm else value.zero_() if name == "bias" else value.normal_(0, 0.02)
                if path in in_bits and name == "weight":
                    made[id(empty)] = in_bits[path](empty, value)
                else:
                    made[id(empty)] = nn.Parameter(value, requires_grad=not bits)
                del value
            setattr(module, name, made[id(empty)])
            if cell.method in EXPERTS_IN_4_BIT and empty.dim() == 3:
                del made[id(empty)]  # else all experts would stay in 16 bit until the model is whole
                quantise_experts(module, name)
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # the rotary frequencies
            fresh = type(module)(config=config).to(device)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)
    if bits and device.type == "cuda":
        model.hf_device_map = {"": torch.cuda.current_device()}  # as a quantised model is loaded: it stays where it is
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"not made: {left}")
    return model.train()


def prepare_layers(model, bits: int, dtype) -> dict:
    """Puts bitsandbytes' layers into the model without weights, as transformers does before it loads.

    Returns:
        by a layer's path, what makes its quantised weight from (the empty one, its value).
    """
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.utils.quantization_config import QuantizationMethod

    from stagewise.quantisation import guard_4bit

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    how = BitsAndBytesConfig(load_in_4bit=True, **four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), how)
    guard_4bit(model)
    model.config.quantization_config, model.hf_quantizer = how, AutoHfQuantizer.from_config(how, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    setattr(model, f"is_loaded_in_{bits}bit", True)

    def to_4_bit(empty, value):
        return bnb.nn.Params4bit(value, requires_grad=False, **empty.__dict__).to(value.device)

    def to_8_bit(empty, value):
        steps, scales, _ = bnb.functional.int8_vectorwise_quant(value.to(torch.float16))
        return bnb.nn.Int8Params(steps, requires_grad=False, has_fp16_weights=False, CB=steps, SCB=scales)

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    make = to_4_bit if bits == 4 else to_8_bit
    return {path: make for path, module in model.named_modules() if isinstance(module, kinds)}


def quantise_experts(module, name: str) -> None:
    """A 3-D parameter in nf4, put together again whenever it is read."""
    from stagewise.experts import hold, pack

    packed, state = pack(getattr(module, name).detach(), twice=True)
    setattr(module, name, packed)
    hold(module, {name: state})


def train(cell: argparse.Namespace, device) -> dict:
    """Takes the steps and says what they took."""
    import torch
    from transformers import TrainerCallback

    from stagewise.adapter import attach_adapter
    from stagewise.callbacks import NonFiniteGuard
    from stagewise.settings import StageArguments
    from supervised_finetuning import SFTTrainer

    model = random_model(cell, device)
    if not cell.method.startswith("full"):
        model = attach_adapter(model, adapter_arguments(cell.shape, cell.method), "CAUSAL_LM")
    cuda = device.type == "cuda"
    vocabulary = SHAPES[cell.shape]["vocab_size"]

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.randint(3, vocabulary, (cell.tokens,), generator=torch.Generator().manual_seed(index))

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(cell.tokens)[None]}

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.times.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        words = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
        args = StageArguments(
            **words,
            bf16=True,
            use_cpu=not cuda,
            per_device_train_batch_size=1,
            max_steps=WARM_UP + cell.steps,
            gradient_checkpointing=cell.checkpointing,
            optim=cell.optim,
            learning_rate=1e-6,
            disable_tqdm=True,
        )
        args._n_gpu = min(args.n_gpu, 1)
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Rows(),
            data_collator=collate,
            guard=NonFiniteGuard(),
            neft_alpha=None,
        )
        clock = Clock()
        trainer.add_callback(clock)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = clock.times[-1] - clock.times[WARM_UP - 1]
    found = {"tokens_per_second": cell.steps * cell.tokens / seconds, "losses": losses(trainer.state.log_history)}
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def losses(history: list[dict]) -> list[float]:
    return [log["loss"] for log in history if "loss" in log]


def quiet() -> None:
    """Nothing but the rows, and what goes wrong."""
    from loguru import logger

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that it casts to float16
    logger.remove()


def run_cell(cell: argparse.Namespace) -> dict:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return train(cell, device)
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {str(error).splitlines()[0][:80]}"}


# ── which cells ─────────────────────────────────────────────────────────────────────────────────────────────────────


def cells_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(shape, method) of every cell that was asked for, in order; experts in 4 bit only where there are experts."""
    if args.cells:
        return [tuple(cell.split(":")) for cell in args.cells.split(",")]
    grid = [(shape, method) for shape in args.shapes.split(",") for method in args.methods.split(",")]
    return [(s, m) for s, m in grid if m not in EXPERTS_IN_4_BIT or "num_local_experts" in SHAPES[s]]


def gpu_room(args: argparse.Namespace) -> tuple[float, str]:
    """Bytes of the GPU and its name; asked in another process, whose CUDA context is gone when a cell begins."""
    if args.gpu_gib:
        return args.gpu_gib * 2**30, f"a GPU of {args.gpu_gib:g} GiB"
    ask = (
        "import torch; there = torch.cuda.is_available(); "
        "print(torch.cuda.mem_get_info()[1] if there else 'inf', torch.cuda.get_device_name() if there else 'CPU')"
    )
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    return float(told[0]), told[1].strip()


def plan(args: argparse.Namespace, room: float) -> list[dict]:
    """A row for each cell with its estimate; "skipped" says which cannot fit into `room` bytes."""
    rows = []
    for shape, method in cells_of(args):
        estimate = predicted(argparse.Namespace(**vars(args) | {"shape": shape, "method": method}))
        row = {"shape": shape, "method": method, "weights": estimate.weights, "estimate": estimate.peak}
        row["moment"] = estimate.moment
        if estimate.peak * MARGIN + CONTEXT > room:
            row["skipped"] = f"cannot fit: the GPU has {room / 2**30:.1f} GiB"
        rows.append(row)
    return rows


def start_cell(shape: str, method: str, args: argparse.Namespace, seconds: float) -> dict:
    """Runs a cell in its own process; whatever happens to it is a remark in the table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        words = [sys.executable, __file__, "--cell", str(out), "--shapes", shape, "--methods", method]
        words += ["--tokens", str(args.tokens), "--steps", str(args.steps), "--optim", args.optim]
        words += [] if args.checkpointing else ["--no_gradient_checkpointing"]
        words += ["--flash_attn"] if args.flash_attn else []
        try:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"stopped after {seconds:.0f} s"}
        if done.returncode or not out.is_file():
            lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
            print(done.stdout[-3000:], file=sys.stderr)
            return {"skipped": f"exit code {done.returncode}: {lines[-1][:80]}"}
        return json.loads(out.read_text(encoding="utf-8"))


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def line(found: dict) -> str:
    """A line of the table."""

    def gib(name: str) -> str:
        return f"{found[name] / 2**30:.1f}" if name in found else ""

    ratio = f"{found['estimate'] / found['peak']:.2f}" if found.get("peak") else ""
    speed = f"{found['tokens_per_second']:,.0f}" if "tokens_per_second" in found else ""
    cells = (found["shape"], found["method"], gib("weights"), gib("peak"), gib("estimate"), ratio, speed)
    return "| " + " | ".join((*cells, found.get("skipped", ""))) + " |"


def table(rows: list[dict]) -> str:
    """Rows as Markdown, those that were measured in one way under one heading; of a cell measured twice the last."""
    parts: dict[str, dict[tuple[str, str], dict]] = {}
    for row in rows:
        parts.setdefault(row["how"], {})[row["shape"], row["method"]] = row
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---|---|" + "---:|" * 5 + "---|"
    return "\n\n".join("\n".join([how, "", head, *map(line, cells.values())]) for how, cells in parts.items())


def heading(args: argparse.Namespace, device: str) -> str:
    """How the rows of a run are measured."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    how = "with" if args.checkpointing else "without"
    flash = ", --flash_attn" if args.flash_attn else ""
    return f"{device}: one row of {args.tokens} tokens, {how} gradient checkpointing, {args.optim}{flash}; {used}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(PUBLISHED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--cells", help="in place of both: shape:method, joined by commas, in this order")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4, help=f"timed steps, after {WARM_UP} others")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--no_gradient_checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--flash_attn", action="store_true", help="as the stages' flag")
    parser.add_argument("--seconds", type=float, default=240, help="limit of a cell")
    parser.add_argument("--minutes", type=float, help="limit of the run: no cell goes on beyond it")
    parser.add_argument("--output", type=Path, help="every row is added to this file, as jsonl, once it is finished")
    parser.add_argument("--dry_run", action="store_true", help="the estimates and what fits; nothing is measured")
    parser.add_argument("--gpu_gib", type=float, help="take the GPU to have this much; default: ask it")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these files of --output, and end")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    asked = [cell.partition(":")[::2] for cell in args.cells.split(",")] if args.cells else []
    shapes, methods = zip(*asked, strict=True) if asked else (args.shapes.split(","), args.methods.split(","))
    flags = ("cells", "cells") if asked else ("shapes", "methods")
    for flag, found, known in zip(flags, (shapes, methods), (SHAPES, METHODS), strict=True):
        if unknown := sorted(set(found) - set(known)):
            parser.error(f"--{flag}: expected some of {', '.join(known)}, found {', '.join(map(repr, unknown))}")
    if lacking := [(s, m) for s, m in asked if m in EXPERTS_IN_4_BIT and "num_local_experts" not in SHAPES[s]]:
        parser.error(f"--cells {':'.join(lacking[0])}: the shape has no experts")
    if args.tokens < 2 or args.steps < 1:
        parser.error("--tokens: expected at least 2, and --steps at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.table:
        lines = [text for path in args.table for text in path.read_text(encoding="utf-8").splitlines()]
        print(table([json.loads(text) for text in lines]))
        return
    quiet()
    if args.cell:
        args.shape, args.method = args.shapes, args.methods
        args.cell.write_text(json.dumps(run_cell(args)), encoding="utf-8")
        return
    began = time.time()
    room, device = gpu_room(args)
    how, rows = heading(args, device), plan(args, room)
    for number, row in enumerate(rows, 1):
        row["how"] = how
        left = args.minutes * 60 - (time.time() - began) if args.minutes else math.inf
        if "skipped" not in row and not args.dry_run:
            seconds = min(args.seconds, left)
            found = start_cell(row["shape"], row["method"], args, seconds) if seconds > 20 else {}
            row.update(found or {"skipped": "the time was up"})
        print(f"{number}/{len(rows)} {line(row)}", file=sys.stderr, flush=True)
        if args.output and not args.dry_run:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows), flush=True)


if __name__ == "__main__":
    main()
