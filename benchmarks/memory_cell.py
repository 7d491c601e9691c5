"""One cell of `benchmarks/memory.py`: its estimate, and its measurement.

    python -m benchmarks.memory_cell '{"shape": "tiny", "method": "lora"}' cell.json     # from the project's root

A process of its own measures a cell, so that what one leaves on the GPU is not counted in the next.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationMethod

from benchmarks.memory_shapes import EXPERTS_IN_4_BIT, SHAPES, WARM_UP, Cell, has_experts
from stagewise.adapters.attach import attach_adapter
from stagewise.config.arguments import AdapterArguments, ModelArguments
from stagewise.models.attention.choose import choose_attention
from stagewise.models.memory import estimate
from stagewise.models.memory.structure import skeleton
from stagewise.models.quantization.bnb import guard_4bit
from stagewise.models.quantization.experts import hold, pack
from stagewise.training.settings import StageArguments
from supervised_finetuning import SFTTrainer

ATTENTION_LAYERS = "q_proj,k_proj,v_proj,o_proj"  # what the adapter takes of experts' models, but for qlora4_all


def make_config(shape: str) -> PretrainedConfig:
    """The config of a published shape."""
    values = dict(SHAPES[shape])
    theta = values.pop("rope_theta", None)
    if theta:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(values.pop("model_type"), **values, **ids)


def dtype_of(cell: Cell) -> torch.dtype:
    """The precision of the weights that are not quantized."""
    return torch.float32 if cell.method == "full" else torch.bfloat16


def with_adapter(model: PreTrainedModel, cell: Cell) -> nn.Module:
    """The model as it is trained: with an adapter of the default rank, or all of it."""
    if not cell.trains_adapter:
        return model
    attention = has_experts(cell.shape) and cell.method != "qlora4_all"
    targets = ATTENTION_LAYERS if attention else "all"
    return attach_adapter(model, AdapterArguments(target_modules=targets), "CAUSAL_LM")


# ── the estimate ────────────────────────────────────────────────────────────────────────────────────────────────────


def predicted(cell: Cell) -> estimate.Memory:
    """What stagewise/models/memory/estimate.py says that the cell takes."""
    model = skeleton(make_config(cell.shape), AutoModelForCausalLM, dtype_of(cell))
    in_bits = estimate.layers_in_bits(model) if cell.bits else set()
    step = estimate.TrainingStep(
        rows=1,
        tokens=cell.tokens,
        logit_tokens=cell.tokens,
        autocast=True,
        checkpointing=cell.checkpointing,
        optim=cell.optim,
        bits=cell.bits,
        experts_in_bits=cell.method in EXPERTS_IN_4_BIT,
    )
    return estimate.estimate(with_adapter(model, cell), step, in_bits)


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def random_model(cell: Cell, device: torch.device) -> PreTrainedModel:
    """The shape with random weights, made on the device one weight at a time and quantized at once.

    At no time does more than one layer's weight stand there in 16 bit beside what is kept.
    """
    config, dtype = make_config(cell.shape), dtype_of(cell)
    model = skeleton(config, AutoModelForCausalLM, dtype)
    arguments = ModelArguments("random", torch_dtype=str(dtype).removeprefix("torch."), flash_attn=cell.flash_attn)
    model.set_attn_implementation(choose_attention(config, arguments))
    in_bits = prepare_layers(model, cell.bits, dtype) if cell.bits else {}
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
                    made[id(empty)] = nn.Parameter(value, requires_grad=not cell.bits)
                del value
            setattr(module, name, made[id(empty)])
            if cell.method in EXPERTS_IN_4_BIT and empty.dim() == 3:
                del made[id(empty)]  # else all experts would stay in 16 bit until the model is whole
                quantize_experts(module, name)
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # the rotary frequencies
            fresh = type(module)(config=config).to(device)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)
    if cell.bits and device.type == "cuda":
        model.hf_device_map = {"": torch.cuda.current_device()}  # as a quantized model is loaded: it stays where it is
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"not made: {left}")
    return model.train()


def prepare_layers(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> dict[str, Callable]:
    """Puts bitsandbytes' layers into the model without weights, as transformers does before it loads.

    Returns:
        by a layer's path, what makes its quantized weight from (the empty one, its value).
    """
    import bitsandbytes as bnb

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


def quantize_experts(module: nn.Module, name: str) -> None:
    """A 3-D parameter in nf4, put together again whenever it is read."""
    packed, state = pack(getattr(module, name).detach(), twice=True)
    setattr(module, name, packed)
    hold(module, {name: state})


# ── the measurement ─────────────────────────────────────────────────────────────────────────────────────────────────


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens, the same ones each time."""

    def __init__(self, tokens: int, vocabulary: int):
        self.tokens, self.vocabulary = tokens, vocabulary

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randint(3, self.vocabulary, (self.tokens,), generator=torch.Generator().manual_seed(index))


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(ids.shape[1])[None]}


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.time())


def measured(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Takes the steps and says what they took."""
    model = with_adapter(random_model(cell, device), cell)
    cuda, clock = device.type == "cuda", Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = StageArguments(
            output_dir=folder,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
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
            train_dataset=Rows(cell.tokens, SHAPES[cell.shape]["vocab_size"]),
            data_collator=collate,
            neft_alpha=None,
        )
        trainer.add_callback(clock)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = clock.times[-1] - clock.times[WARM_UP - 1]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    found: dict[str, Any] = {"tokens_per_second": cell.steps * cell.tokens / seconds, "losses": losses}
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def main(told: str, out: Path) -> None:
    """Measures the cell that `told` describes in JSON, and writes what it found to `out`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that it casts to float16
    logger.remove()
    try:
        found = measured(Cell(**json.loads(told)), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except torch.OutOfMemoryError as error:
        found = {"skipped": f"out of memory: {str(error).splitlines()[0][:80]}"}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
