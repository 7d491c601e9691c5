"""What `benchmarks/memory.py` measures: a published shape, trained by one method."""

from __future__ import annotations

from dataclasses import dataclass

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
METHODS = ("full", "full16", "lora", "qlora8", "qlora4", "qlora4_experts")
EXPERTS_IN_4_BIT = ("qlora4_experts",)  # methods for shapes with experts alone
WARM_UP = 2  # steps before the timed ones
BITS = {"qlora8": 8, "qlora4": 4, "qlora4_experts": 4}


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
        """Of the linear layers' weights, where they are quantised."""
        return BITS.get(self.method)

    @property
    def trains_adapter(self) -> bool:
        return not self.method.startswith("full")


def has_experts(shape: str) -> bool:
    return "num_local_experts" in SHAPES[shape]
