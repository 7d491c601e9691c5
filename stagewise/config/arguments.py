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
    """Which model, from where, in which precision."""

    heading = "Model"

    model_name_or_path: str = field(metadata={"help": "Model directory, or a hub name."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
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
        default="auto", metadata={"help": "Weights' precision: auto (the checkpoint's), float32, bfloat16, float16."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads one process's model over its GPUs; not with torchrun."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model repository ships."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the linear layers in 4 bit (nf4, bitsandbytes)."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the linear layers in 8 bit (bitsandbytes)."})
    qlora: bool = field(
        default=False, metadata={"help": "4 bit as QLoRA does it: nf4, its scales quantized once more."}
    )
    quantize_experts: bool = field(
        default=True,
        metadata={"help": "4 bit: experts held as one 3-D parameter, too; False: they stay in 16 bit."},
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={"help": "Longer context by scaled positions: linear, dynamic (NTK), yarn or longrope."},
    )
    rope_factor: float | None = field(
        default=None,
        metadata={"help": "How many times the model's own context; default: as many as the run's length needs."},
    )
    rope_factors_file: str | None = field(
        default=None, metadata={"help": "longrope: json file with its lists short_factor and long_factor."}
    )
    router_aux_loss: bool = field(
        default=False,
        metadata={"help": "Mixture of experts: add the routers' loss, which keeps the experts in use alike."},
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of --router_aux_loss; default: the checkpoint's own."}
    )
    flash_attn: bool = field(
        default=False,
        metadata={"help": "FlashAttention where installed, else torch's fastest exact attention on this GPU."},
    )
    shift_attn: bool = field(
        default=False, metadata={"help": "Shifted sparse attention (S²-Attn) in training; full attention elsewhere."}
    )
    shift_group_ratio: float = field(default=0.25, metadata={"help": "--shift_attn: a group's share of the row."})

    # (flag, tokens): the length that the run trains on, which `check_shared` finds among the other flags. No flag.
    rope_length = None
    # "rope" of run.json: how positions were scaled where the adapter that is to be put on this model was trained.
    kept_rope = None

    @property
    def bits(self) -> int | None:
        """4 or 8 where the base is quantized while it loads, else None."""
        return 4 if self.load_in_4bit or self.qlora else 8 if self.load_in_8bit else None


@dataclass
class DataArguments:
    """Which records are trained on and which are held out."""

    heading = "Data"

    train_file_dir: str | None = field(
        default=None,
        metadata={"help": "File, or folder searched with its subfolders; several joined by commas; or a .yaml list."},
    )
    data_weights: str | None = field(
        default=None, metadata={"help": "Shares of the sources of --train_file_dir, joined by commas: 0.7,0.3."}
    )
    deduplicate: bool = field(default=False, metadata={"help": "Leave out training records that were read before."})
    validation_file_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    dataset_name: str | None = field(default=None, metadata={"help": "A `datasets` set: hub name or local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that set."})
    validation_split_percentage: int | None = field(
        default=None, metadata={"help": "Hold out this share of the training records, if no validation set is given."}
    )
    max_train_samples: int = field(
        default=-1, metadata={"help": "Use at most this many training records; in PT rows of --block_size; -1 = all."}
    )
    max_eval_samples: int = field(
        default=-1, metadata={"help": "The same for validation records; in PT blocks, which are not packed."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that encode the data; default: one a core, at most four."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Encode again what --cache_dir already holds."})
    on_bad_record: str = field(
        default="error", metadata={"help": "error: stop at the first; skip: count it, write it to rejected.jsonl."}
    )


@dataclass
class ChatArguments:
    """How a conversation becomes text."""

    heading = "Chat template"

    template_name: str | None = field(
        default=None, metadata={"help": "Chat template of template.py; default: the tokenizer's own, else vicuna."}
    )
    force_template: bool = field(
        default=False, metadata={"help": "Use --template_name although the model was trained in another template."}
    )
    enable_thinking: bool | None = field(
        default=None,
        metadata={"help": "Answers of a thinking model begin with its thoughts; False: with none. Default: its own."},
    )


@dataclass
class PairArguments:
    """Length limits of prompt and answer."""

    heading = "Lengths of prompt and answer"

    max_source_length: int = field(default=2048, metadata={"help": "Tokens of the prompt with its history."})
    max_target_length: int = field(default=512, metadata={"help": "Tokens of an answer."})


@dataclass
class LanguageModelArguments:
    """How rows for the language-model loss are made."""

    heading = "Rows of text"

    packing: bool = field(
        default=True, metadata={"help": "Several records in one row, attending only to themselves; False: padded."}
    )
    neft_alpha: float | None = field(
        default=None, metadata={"help": "NEFTune: noise on the embeddings, uniform within ±alpha / sqrt(L d)."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the files while training, in constant memory; needs --max_steps."}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Records that --streaming shuffles among."})


@dataclass
class AdapterArguments:
    """What is trained: an adapter, or all weights."""

    heading = "Adapter"

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; False trains all weights."})
    fine_tuning_type: str = field(
        default="lora",
        metadata={
            "help": "full (the same as --use_peft False), lora, adalora, prompt_tuning, p_tuning or prefix_tuning."
        },
    )
    target_modules: str = field(default="all", metadata={"help": "`all` linear layers, or names joined by commas."})
    lora_rank: int = field(default=8, metadata={"help": "Rank r of the adapter."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale: the adapter's output times alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    modules_to_save: str | None = field(
        default=None, metadata={"help": "Modules trained in full beside the adapter, e.g. embed_tokens,lm_head."}
    )
    peft_path: str | None = field(default=None, metadata={"help": "Adapter to go on from."})
    longlora_plus: bool = field(
        default=True, metadata={"help": "With --shift_attn: embedding and norms train in full beside the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "LoRA's scale is alpha / sqrt(r) (rsLoRA)."})
    use_dora: bool = field(
        default=False, metadata={"help": "Weights are split into magnitude and direction; LoRA turns the latter."}
    )
    init_lora_weights: str = field(
        default="default",
        metadata={
            "help": "LoRA's start: default (B = 0), gaussian, or pissa (the base's largest singular directions)."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the learning rate of B is this many times that of A."}
    )
    init_r: int = field(default=12, metadata={"help": "AdaLoRA: rank of each matrix at first."})
    target_r: int = field(default=8, metadata={"help": "AdaLoRA: average rank at the end."})
    tinit: int = field(default=0, metadata={"help": "AdaLoRA: steps before ranks begin to fall."})
    tfinal: int = field(default=0, metadata={"help": "AdaLoRA: steps at the end in which ranks stay as they are."})
    deltaT: int = field(default=1, metadata={"help": "AdaLoRA: ranks are chosen anew every so many steps."})
    beta1: float = field(default=0.85, metadata={"help": "AdaLoRA: how slowly a weight's importance is averaged."})
    beta2: float = field(default=0.85, metadata={"help": "AdaLoRA: how slowly its uncertainty is averaged."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "AdaLoRA: weight of the term that keeps its matrices orthogonal."}
    )
    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Prompt, P- and prefix tuning: learned tokens before the text."}
    )
    encoder_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "P-tuning, and prefix tuning with --prefix_projection: width of the network that the virtual "
            "tokens are trained through; default: the embedding's."
        },
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "Prefix tuning: train the prefix through a network of two layers."}
    )
    # Names of the flags that stood on the command line, also with their default values; set by `run.start`.
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
        """Why rows cannot be packed with this method, or None."""
        if self.method not in VIRTUAL_TOKENS:
            return None
        return f"{self.method}: the virtual tokens stand before a row, not before each of its documents"

    def asks(self, name: str) -> bool:
        """Whether a flag was given, or has a value that is not its default."""
        default = next(f.default for f in dataclasses.fields(self) if f.name == name)
        return name in self.given or getattr(self, name) != default


@dataclass
class PredecessorArguments:
    """What the model is before this stage changes it: the reference is that, too."""

    heading = "What the model was before"

    checkpoint_dir: str | None = field(
        default=None,
        metadata={
            "help": "SFT adapter to start from: merged into the model in memory, and so part of the reference. "
            "--peft_path goes on from an adapter of this stage, which the reference is without."
        },
    )


@dataclass
class RunArguments:
    """What every stage's run has beside transformers' TrainingArguments, and where its defaults differ from those."""

    heading = "The run"

    output_dir: str | None = field(default=None, metadata={"help": "The folder that the run is written to."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished run in --output_dir."})
    dry_run: bool = field(
        default=False, metadata={"help": "Arguments, data and one batch; predicted memory and time; then stop."}
    )
    save_eval_records: bool = field(
        default=False, metadata={"help": "Write each validation record's numbers to eval_records/step-N.jsonl."}
    )
    eval_samples: int = field(
        default=3,
        metadata={
            "help": "Validation records that each evaluation also shows: what the model says to them (eval_samples/, "
            "TensorBoard, report.html); of a reward model the scores. 0: none."
        },
    )
    quiet: bool = field(
        default=False, metadata={"help": "Plain lines on a terminal, too: no line that is written over, no bars."}
    )
    report_to: str | None = field(
        default="tensorboard", metadata={"help": "Trackers, joined by commas: tensorboard, wandb …; or none."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "TensorBoard's files; default: logs/ in the output directory."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave losses that are NaN or infinite out of the log's mean; their steps are skipped either way."
        },
    )
    save_total_limit: int | None = field(default=3, metadata={"help": "Whole checkpoints that are kept; 0: all."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See torch's DDP."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays False: batches hold what is needed, nothing more."}
    )

    def check(self) -> None:
        """Raises ArgumentError for what no run can have."""
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
# Method -> the flags that say how it is done.
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": (*_LAYERS, "lora_rank", "use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"),
    "adalora": (*_LAYERS, *_SCHEDULE),
    "prompt_tuning": ("num_virtual_tokens",),
    "p_tuning": ("num_virtual_tokens", "encoder_hidden_size"),
    "prefix_tuning": ("num_virtual_tokens", "encoder_hidden_size", "prefix_projection"),
}
