"""Command-line flags for chat and inference: the model, and how answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagewise.errors import ChatModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig

MAX_NEW_TOKENS = 512
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}


@dataclass
class ChatModelArguments:
    """Which model answers."""

    heading = "The model"

    base_model: str | None = field(
        default=None, metadata={"help": "Model directory or hub name; default: the base named by --lora_model."}
    )
    lora_model: str | None = field(
        default=None,
        metadata={"help": "Adapter for the model: LoRA, AdaLoRA, prompt, P- or prefix tuning; a folder or hub name."},
    )
    tokenizer_path: str | None = field(default=None, metadata={"help": "Default: the adapter's, else the model's."})
    template_name: str | None = field(
        default=None, metadata={"help": "Chat template of template.py; default: the tokenizer's own, else vicuna."}
    )
    force_template: bool = field(
        default=False, metadata={"help": "Use --template_name even if the model was trained with another template."}
    )
    enable_thinking: bool | None = field(
        default=None,
        metadata={"help": "False: a thinking model answers without thoughts. Default: the model's own setting."},
    )
    torch_dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the weights: auto (the checkpoint's), float32, bfloat16, float16."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the linear layers in 4 bits (nf4, bitsandbytes)."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the linear layers in 8 bits (bitsandbytes)."})
    rope_scaling: str | None = field(
        default=None,
        metadata={"help": "RoPE scaling for a longer context: linear, dynamic (NTK), yarn or longrope."},
    )
    rope_factor: float | None = field(default=None, metadata={"help": "RoPE scaling factor; default: 2."})
    rope_factors_file: str | None = field(
        default=None, metadata={"help": "For longrope: JSON file with the lists short_factor and long_factor."}
    )
    flash_attn: bool = field(
        default=False,
        metadata={"help": "Use FlashAttention if installed, else torch's fastest exact attention on this GPU."},
    )
    device: str = field(default="auto", metadata={"help": "auto (a GPU if there is one), cpu or cuda."})
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads one process's model over its GPUs; not with torchrun."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model repository ships."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of a hub model; not the adapter's."}
    )
    hf_hub_token: str | None = field(default=None, metadata={"help": "Token for a private hub model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are cached."})


# Flags that affect sampling, so that giving one turns it on; and flags of beam search only.
DRAWING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
OF_BEAMS = ("length_penalty", "early_stopping")


@dataclass
class SamplingArguments:
    """How an answer is generated, by transformers' names; settings not given come from the model's
    generation_config.json.

    Giving one of DRAWING turns on sampling; temperature 0 selects greedy decoding.
    """

    heading = "Its answers"

    do_sample: bool | None = field(default=None, metadata={"help": "Sample tokens; False: greedy decoding."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Sampling temperature: below 1 sharper, above 1 flatter; 0 = no sampling."},
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Nucleus sampling: the smallest set of tokens with this total probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Sample from the k most probable tokens; 0 = all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Exclude tokens whose probability is below this fraction of the highest one."}
    )
    typical_p: float | None = field(
        default=None,
        metadata={
            "help": "Typical sampling: the tokens closest to the expected information, up to this total probability."
        },
    )
    top_h: float | None = field(
        default=None, metadata={"help": "Sample from the most probable tokens with this share of the entropy."}
    )
    epsilon_cutoff: float | None = field(
        default=None, metadata={"help": "Exclude tokens below this probability, for example 0.0005."}
    )
    eta_cutoff: float | None = field(
        default=None, metadata={"help": "The same with a threshold that falls with the entropy, for example 0.001."}
    )
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Above 1: tokens that already occurred become less probable."}
    )
    no_repeat_ngram_size: int | None = field(
        default=None, metadata={"help": "No sequence of n tokens occurs twice; 0 = no limit."}
    )
    bad_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "Words that must not be generated: their token sequences, with and without a leading space."
        },
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Strings that end an answer and are not part of it."}
    )
    min_new_tokens: int | None = field(
        default=None, metadata={"help": "Minimum number of tokens before an end marker."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": f"Maximum tokens of an answer; default: the model's own, else {MAX_NEW_TOKENS}, at most half the "
            "context."
        },
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "Beam search with this many beams; not with sampling."}
    )
    length_penalty: float | None = field(
        default=None,
        metadata={
            "help": "--num_beams: an answer's log-probability is divided by its length to this power; above 0 favors "
            "long ones, below 0 short ones."
        },
    )
    early_stopping: str | None = field(
        default=None,
        metadata={
            "help": "--num_beams: the search ends with as many whole answers (True), where a better one is unlikely "
            "(False), or where none can come (never)."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "The same seed gives the same answer to the same prompt."}
    )

    @property
    def draws(self) -> list[str]:
        """The given flags that turn on sampling."""
        return [name for name in DRAWING if getattr(self, name) is not None]

    def settled(self, own: GenerationConfig | None = None) -> dict[str, Any]:
        """Every setting with its value, None if it has no effect; `own` provides those that are None here.

        Raises:
            ChatModelError: for a value out of range, or one that would have no effect.
        """
        sample = self._samples(own)
        values: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 50,  # transformers' own
            "min_p": 0.0,
            **dict.fromkeys(("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")),
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            **dict.fromkeys(("bad_words", "stop_strings", "min_new_tokens", *OF_BEAMS)),
            "num_beams": 1,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        for name, usual in values.items():
            given, of_model = getattr(self, name), getattr(own, name, None)
            values[name] = given if given is not None else usual if of_model is None else of_model
        if sample and self.num_beams is None:
            values["num_beams"] = 1
        _check_ranges(values, sample)
        if sample and values["num_beams"] > 1:
            raise ChatModelError(f"--num_beams {values['num_beams']}: beam search draws nothing at random; leave out "
                               "what asks for sampling (--do_sample, --temperature, --top_p …)")  # fmt: skip
        if isinstance(values["stop_strings"], str):  # as in some models' files
            values["stop_strings"] = [values["stop_strings"]]
        if not sample:
            values |= dict.fromkeys(("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"))
        if values["num_beams"] == 1:
            values |= dict.fromkeys(OF_BEAMS)
        elif values["early_stopping"] is not None:
            values["early_stopping"] = EARLY_STOPPING[str(values["early_stopping"]).lower()]
        longest = values["max_new_tokens"] if own is not None or self.max_new_tokens else None
        if longest and (values["min_new_tokens"] or 0) > longest:
            raise ChatModelError(f"--min_new_tokens {values['min_new_tokens']}: more than --max_new_tokens {longest}")
        return {**values, "do_sample": sample, "seed": self.seed}

    def _samples(self, own: GenerationConfig | None) -> bool:
        """Whether tokens are sampled. Raises ChatModelError for a flag without effect in that case, or on one beam."""
        asks, greedy, beams = self.draws, self.temperature == 0, (self.num_beams or 1) > 1
        if self.do_sample is False and asks and not greedy:
            raise ChatModelError(f"--{asks[0]} has no effect with --do_sample False: leave one of them out")
        if self.do_sample and greedy:
            raise ChatModelError("--temperature 0 always takes the most probable token: leave --do_sample out")
        if greedy and (others := [name for name in asks if name != "temperature"]):
            raise ChatModelError(f"--{others[0]} has no effect with --temperature 0: leave one of them out")
        if not beams and (shaping := [name for name in OF_BEAMS if getattr(self, name) is not None]):
            raise ChatModelError(
                f"--{shaping[0]} has no effect without beam search: give --num_beams above 1, or leave it out"
            )
        sample = self.do_sample
        if sample is None:
            sample = not greedy and (bool(asks) or (bool(getattr(own, "do_sample", False)) and not beams))
        known = own is not None or greedy or beams or self.do_sample is False  # overrides the model's own settings
        if self.seed is not None and not sample and known:
            raise ChatModelError("--seed has no effect on the most probable tokens: leave it out, or add --do_sample")
        return sample


def _check_ranges(values: dict[str, Any], sample: bool) -> None:
    limits = {
        "temperature": (lambda v: v > 0, "a number above 0"),
        "top_p": (lambda v: 0 < v <= 1, "above 0, at most 1"),
        "top_k": (lambda v: v >= 0, "0 or more"),
        "min_p": (lambda v: 0 <= v <= 1, "0 to 1"),
        "typical_p": (lambda v: 0 < v <= 1, "above 0, at most 1"),
        "top_h": (lambda v: 0 < v <= 1, "above 0, at most 1"),
        "epsilon_cutoff": (lambda v: 0 <= v < 1, "0 or more, below 1"),
        "eta_cutoff": (lambda v: 0 <= v < 1, "0 or more, below 1"),
        "repetition_penalty": (lambda v: v > 0, "a number above 0"),
        "no_repeat_ngram_size": (lambda v: v >= 0, "0 or more"),
        "bad_words": (lambda v: all(word.strip() for word in v), "words"),
        "stop_strings": (all, "texts"),
        "min_new_tokens": (lambda v: v >= 0, "0 or more"),
        "num_beams": (lambda v: v >= 1, "at least 1"),
        "early_stopping": (lambda v: str(v).lower() in EARLY_STOPPING, "True, False or never"),
        "max_new_tokens": (lambda v: v >= 1, "at least 1"),
    }
    for name, (fits, expected) in limits.items():
        value = values[name]
        if value is not None and not fits(value) and (sample or name not in DRAWING):
            raise ChatModelError(f"--{name}: expected {expected}, found {value!r}")
