"""What `benchmarks/memory.py` measures: a published shape, trained by one method."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
NAMES += ("vocab_size",)


def sizes(*numbers: int) -> dict[str, int]:
    """NAMES of a config."""
    return dict(zip(NAMES, numbers, strict=True))


QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 500000.0}
MIXTRAL = {"model_type": "mixtral", "rope_theta": 1000000.0, "sliding_window": None}
TIED, APART = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# Qwen2.5-0.5B, -1.5B, -14B, -32B, Llama-3.1-8B and Mixtral-8x7B-v0.1 as published; the tiny ones try the script out.
SHAPES = {
    "0.5B": QWEN | TIED | sizes(896, 4864, 24, 14, 2, 151936),
    "1.5B": QWEN | TIED | sizes(1536, 8960, 28, 12, 2, 151936),
    "8B": LLAMA | APART | sizes(4096, 14336, 32, 32, 8, 128256),
    "14B": QWEN | APART | sizes(5120, 13824, 48, 40, 8, 152064),
    "32B": QWEN | APART | sizes(5120, 27648, 64, 40, 8, 152064),
    "8x7B": MIXTRAL | APART | EXPERTS | sizes(4096, 14336, 32, 32, 8, 32000),
    "tiny": {"model_type": "llama"} | sizes(64, 128, 2, 4, 2, 320),
    "tiny_moe": {"model_type": "mixtral", "num_local_experts": 4} | sizes(64, 128, 2, 4, 2, 320),
}
PUBLISHED = ("0.5B", "1.5B", "8B", "14B", "32B", "8x7B")
METHODS = ("full", "full16", "lora", "qlora8", "qlora4", "qlora4_experts", "qlora4_all")
EXPERTS_IN_4_BIT = ("qlora4_experts", "qlora4_all")  # methods for shapes with experts alone
WARM_UP = 2  # steps before the timed ones
BITS = {"qlora8": 8, "qlora4": 4, "qlora4_experts": 4, "qlora4_all": 4}


@dataclass(frozen=True)
class Cell:
    """One measurement: a process of its own, a row of the table."""

    shape: str
    method: str
    tokens: int = 2048
    steps: int = 4
    optim: str = "adamw_torch_fused"
    checkpointing: bool = True
    flash_attn: bool = False

    @property
    def bits(self) -> int | None:
        """Of the linear layers' weights, where they are quantized."""
        return BITS.get(self.method)

    @property
    def trains_adapter(self) -> bool:
        return not self.method.startswith("full")


def has_experts(shape: str) -> bool:
    return "num_local_experts" in SHAPES[shape]
