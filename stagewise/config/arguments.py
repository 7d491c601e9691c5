"""Flags that two or more stages share, declared once.

`stagewise/config/command_line.py` reads them, `stagewise/config/checks.py` refuses those that do not fit together.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field

from stagewise.errors import ArgumentError


@dataclass
class ModelArguments:
    """Which model to load, from where, and in which precision."""

    heading = "Model"

    model_name_or_path: str = field(metadata={"help": "Model directory, or a hub name."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer directory or hub name; default: the model's."}
    )
    model_type: str = field(
        default="auto",
        metadata={"help": "Architecture you expect (llama, qwen3, bloom …); checked against the config."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where downloads and encoded data are cached; encoded data is cached only here."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    hf_hub_token: str | None = field(default=None, metadata={"help": "Token for a private hub model."})
    torch_dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the weights: auto (the checkpoint's), float32, bfloat16, float16."},
    )
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads one process's model over its GPUs; not with torchrun."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model repository ships."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the linear layers in 4 bits (nf4, bitsandbytes)."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the linear layers in 8 bits (bitsandbytes)."})
    qlora: bool = field(default=False, metadata={"help": "4-bit loading as in QLoRA: nf4 with double quantization."})
    quantize_experts: bool = field(
        default=True,
        metadata={
            "help": "With 4-bit loading: also quantize experts that are stored as one 3-D parameter; "
            "False: they stay in 16 bit."
        },
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={"help": "RoPE scaling for a longer context: linear, dynamic (NTK), yarn or longrope."},
    )
    rope_factor: float | None = field(
        default=None,
        metadata={"help": "RoPE scaling factor; default: as large as the run's sequence length needs."},
    )
    rope_factors_file: str | None = field(
        default=None, metadata={"help": "For longrope: JSON file with the lists short_factor and long_factor."}
    )
    router_aux_loss: bool = field(
        default=False,
        metadata={"help": "Mixture of experts: add the router load-balancing loss."},
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of --router_aux_loss; default: the checkpoint's own."}
    )
    flash_attn: bool = field(
        default=False,
        metadata={"help": "Use FlashAttention if installed, else torch's fastest exact attention on this GPU."},
    )
    shift_attn: bool = field(
        default=False,
        metadata={"help": "Train with shifted sparse attention (S²-Attn, LongLoRA); evaluation uses full attention."},
    )
    shift_group_ratio: float = field(
        default=0.25, metadata={"help": "With --shift_attn: group size as a share of the row length."}
    )

    # (flag, tokens): the training length, which `check_shared` finds among the other flags. Not a flag itself.
    rope_length = None
    # "rope" of run.json: how positions were scaled when the adapter to be attached was trained.
    kept_rope = None

    @property
    def bits(self) -> int | None:
        """4 or 8 if the base is quantized while loading, else None."""
        return 4 if self.load_in_4bit or self.qlora else 8 if self.load_in_8bit else None


@dataclass
class DataArguments:
    """Which records to train on and which to hold out."""

    heading = "Data"

    train_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "Training file or folder (searched recursively), several joined by commas, or a .yaml list."
        },
    )
    data_weights: str | None = field(
        default=None,
        metadata={"help": "Sampling weights of the sources of --train_file_dir, joined by commas: 0.7,0.3."},
    )
    deduplicate: bool = field(default=False, metadata={"help": "Drop duplicate training records."})
    validation_file_dir: str | None = field(
        default=None, metadata={"help": "Validation file or folder, in the same forms."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset for the `datasets` library: hub name or local folder."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration name of that dataset."})
    validation_split_percentage: int | None = field(
        default=None,
        metadata={"help": "Percentage of the training records to hold out when no validation set is given."},
    )
    max_train_samples: int = field(
        default=-1, metadata={"help": "Use at most this many training records; in PT rows of --block_size; -1 = all."}
    )
    max_eval_samples: int = field(
        default=-1, metadata={"help": "The same for validation records; in PT blocks, which are not packed."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that encode the data; default: one per core, at most four."}
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Ignore the encoded data in --cache_dir and encode again."}
    )
    on_bad_record: str = field(
        default="error",
        metadata={"help": "error: stop at the first malformed record; skip: count it and write it to rejected.jsonl."},
    )


@dataclass
class ChatArguments:
    """How a conversation becomes text."""

    heading = "Chat template"

    template_name: str | None = field(
        default=None, metadata={"help": "Chat template of template.py; default: the tokenizer's own, else vicuna."}
    )
    force_template: bool = field(
        default=False, metadata={"help": "Use --template_name even if the model was trained with another template."}
    )
    enable_thinking: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a thinking model's responses start with a thinking block; default: the "
            "model's own setting."
        },
    )


@dataclass
class PairArguments:
    """Length limits of prompt and answer."""

    heading = "Lengths of prompt and answer"

    max_source_length: int = field(
        default=2048, metadata={"help": "Maximum tokens of the prompt, including earlier turns."}
    )
    max_target_length: int = field(default=512, metadata={"help": "Maximum tokens of a response."})


@dataclass
class LanguageModelArguments:
    """How rows for the language-model loss are built."""

    heading = "Rows of text"

    packing: bool = field(
        default=True,
        metadata={"help": "Pack several records into one row, each attending only to itself; False: pad."},
    )
    neft_alpha: float | None = field(
        default=None, metadata={"help": "NEFTune: uniform noise on the embeddings within ±alpha / sqrt(L d)."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the files while training, with constant memory; needs --max_steps."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Size of the shuffle buffer of --streaming, in records."}
    )


@dataclass
class AdapterArguments:
    """What to train: an adapter, or all weights."""

    heading = "Adapter"

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; False trains all weights."})
    fine_tuning_type: str = field(
        default="lora",
        metadata={
            "help": "full (the same as --use_peft False), lora, adalora, prompt_tuning, p_tuning or prefix_tuning."
        },
    )
    target_modules: str = field(
        default="all", metadata={"help": "Modules to adapt: `all` linear layers, or names joined by commas."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank r of the adapter."})
    lora_alpha: float = field(
        default=16.0, metadata={"help": "LoRA alpha: the adapter's output is scaled by alpha / r."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    modules_to_save: str | None = field(
        default=None,
        metadata={"help": "Modules trained in full in addition to the adapter, e.g. embed_tokens,lm_head."},
    )
    peft_path: str | None = field(default=None, metadata={"help": "Adapter to continue training from."})
    longlora_plus: bool = field(
        default=True, metadata={"help": "With --shift_attn: also train embeddings and norms in full."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilized LoRA: scale by alpha / sqrt(r)."})
    use_dora: bool = field(
        default=False,
        metadata={"help": "DoRA: decompose weights into magnitude and direction; LoRA updates the direction."},
    )
    init_lora_weights: str = field(
        default="default",
        metadata={
            "help": "LoRA initialization: default (B = 0), gaussian, or pissa (the base's principal singular vectors)."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: ratio of B's learning rate to A's."}
    )
    init_r: int = field(default=12, metadata={"help": "AdaLoRA: initial rank of each matrix."})
    target_r: int = field(default=8, metadata={"help": "AdaLoRA: target average rank."})
    tinit: int = field(default=0, metadata={"help": "AdaLoRA: warmup steps before ranks are reduced."})
    tfinal: int = field(default=0, metadata={"help": "AdaLoRA: final steps with fixed ranks."})
    deltaT: int = field(default=1, metadata={"help": "AdaLoRA: steps between rank reallocations."})
    beta1: float = field(default=0.85, metadata={"help": "AdaLoRA: EMA coefficient of the sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "AdaLoRA: EMA coefficient of the uncertainty."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "AdaLoRA: weight of the orthogonality regularization."}
    )
    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Prompt tuning, P-tuning and prefix tuning: number of virtual tokens."}
    )
    encoder_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "P-tuning, and prefix tuning with --prefix_projection: width of the network that the virtual "
            "tokens are trained through; default: the embedding's."
        },
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "Prefix tuning: train the prefix through a two-layer MLP."}
    )
    # Names of the flags on the command line, including those given their default value; set by `start`.
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    @property
    def trains_adapter(self) -> bool:
        return self.use_peft and self.fine_tuning_type != "full"

    @property
    def method(self) -> str:
        """One of METHODS."""
        return self.fine_tuning_type if self.use_peft else "full"

    @property
    def padded_because(self) -> str | None:
        """The reason why rows cannot be packed with this method, or None."""
        if self.method not in VIRTUAL_TOKENS:
            return None
        return f"{self.method}: the virtual tokens stand before a row, not before each of its documents"

    def asks(self, name: str) -> bool:
        """Whether a flag was given, or has a value other than its default."""
        default = next(f.default for f in dataclasses.fields(self) if f.name == name)
        return name in self.given or getattr(self, name) != default


@dataclass
class PredecessorArguments:
    """What happens to the model before this stage trains it, and to its reference as well."""

    heading = "What the model was before"

    checkpoint_dir: str | None = field(
        default=None,
        metadata={
            "help": "SFT adapter to start from: merged into the model in memory, and so part of the reference. "
            "--peft_path continues from an adapter of this stage, which the reference is without."
        },
    )


@dataclass
class RunArguments:
    """Flags of every stage's run beside transformers' TrainingArguments, and defaults that differ from those."""

    heading = "The run"

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the run's results."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished run in --output_dir."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check arguments, data and one batch, report the estimated memory and time, and stop."},
    )
    save_eval_records: bool = field(
        default=False, metadata={"help": "Write the metrics of each validation record to eval_records/step-N.jsonl."}
    )
    eval_samples: int = field(
        default=3,
        metadata={
            "help": "Validation records whose responses (for a reward model: scores) each evaluation "
            "saves to eval_samples/, TensorBoard and report.html. 0: none."
        },
    )
    quiet: bool = field(default=False, metadata={"help": "Plain log lines on a terminal: no progress bars."})
    report_to: str | None = field(
        default="tensorboard", metadata={"help": "Trackers, joined by commas: tensorboard, wandb …; or none."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Folder for TensorBoard files; default: logs/ in the output directory."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log entries."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Exclude NaN and infinite losses from the logged mean; such steps are skipped either way."},
    )
    save_total_limit: int | None = field(
        default=3, metadata={"help": "Number of complete checkpoints to keep; 0: all."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See torch's DDP."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: batches contain only what is needed."}
    )

    def check(self) -> None:
        """Raises ArgumentError for values that no run can have."""
        if self.output_dir is None:
            raise ArgumentError("--output_dir: missing; give the folder that the run is written to")
        deepspeed = getattr(self, "deepspeed", None)
        if isinstance(deepspeed, str) and not deepspeed.startswith("{") and not os.path.isfile(deepspeed):
            raise ArgumentError(f"--deepspeed {deepspeed}: no such file; zero2.json and zero3.json are ready-made")
        if self.remove_unused_columns:
            raise ArgumentError(
                "--remove_unused_columns True: batches hold what is needed, nothing more; leave it out"
            )


VIRTUAL_TOKENS = ("prompt_tuning", "p_tuning", "prefix_tuning")
_LAYERS = ("target_modules", "lora_alpha", "lora_dropout", "modules_to_save")
_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
# Method -> the flags that configure it.
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": (*_LAYERS, "lora_rank", "use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"),
    "adalora": (*_LAYERS, *_SCHEDULE),
    "prompt_tuning": ("num_virtual_tokens",),
    "p_tuning": ("num_virtual_tokens", "encoder_hidden_size"),
    "prefix_tuning": ("num_virtual_tokens", "encoder_hidden_size", "prefix_projection"),
}
