r"""Continued pretraining: trains a model on plain text.

    python pretraining.py --model_name_or_path models/SmolLM2-135M-Instruct --output_dir outputs/pt \
        --train_file_dir data/pretrain/train --validation_file_dir data/pretrain/validation

    torchrun --nproc_per_node 8 pretraining.py …                          # eight GPUs
    torchrun --nproc_per_node 8 pretraining.py --deepspeed zero2.json …   # with DeepSpeed

A `.txt` file is one document, and so is a line of a `.jsonl` file with a "text" key; folders are searched recursively.
Documents are cut into blocks of at most --block_size tokens; several blocks share a row and do not attend to each
other. The adapter is written to --output_dir; `merge_peft_adapter.py` folds it into the model for the next stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewise.config.arguments import AdapterArguments, DataArguments, LanguageModelArguments, ModelArguments
from stagewise.formats.readers import TEXT_FILES
from stagewise.training.first_look import first_look


@dataclass
class PTArguments:
    block_size: int = field(default=1024, metadata={"help": "Tokens per row; longer documents are split into blocks."})


FLAGS = [ModelArguments, DataArguments, LanguageModelArguments, AdapterArguments, PTArguments]
if __name__ == "__main__":  # report a wrong flag or path before torch is imported
    first_look(FLAGS, __doc__, stage=True, texts=TEXT_FILES)


from transformers import PreTrainedTokenizerBase

from stagewise.adapters.attach import attach_adapter
from stagewise.chat.encoding import TextEncoder
from stagewise.data.examples import Examples
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits
from stagewise.data.streaming.splits import read_streamed_splits
from stagewise.formats.parsers import parse_text
from stagewise.models.attention.choose import rows_by_flags
from stagewise.models.config import load_config
from stagewise.models.loading import load_causal_lm
from stagewise.models.router_loss import router_loss
from stagewise.models.tokenizer import load_tokenizer
from stagewise.training.evaluation_set import EvaluationTable, ValidationSet
from stagewise.training.lm_trainer import LanguageModelTrainer, training_rows
from stagewise.training.metrics import language_model_metrics
from stagewise.training.settings import StageArguments
from stagewise.training.start import start
from stagewise.training.stream_trainer import check_streaming


class PTTrainer(LanguageModelTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean negative log-likelihood of all tokens of the whole batch, on all processes."""
        nll, _ = self.token_losses(model, inputs)
        loss = nll.sum() / num_items_in_batch * self.accelerator.num_processes + self.router_share()
        return self.guard.watch(loss)


def read_data(
    args: StageArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    rows_args: LanguageModelArguments,
    adapter_args: AdapterArguments,
    pt_args: PTArguments,
) -> tuple[Splits, PreTrainedTokenizerBase]:
    """Encoded blocks of text, and the tokenizer; `python -m tools.show_data` shows them."""
    config = load_config(model_args)  # a wrong --model_type or architecture fails here, before any data is read
    because, shifted = adapter_args.padded_because, model_args.shift_attn
    padded = rows_by_flags(config, rows_args.packing, because, shifted)[0] is False
    tokenizer = load_tokenizer(model_args)
    loader = SplitLoader(data_args, model_args, args, TEXT_FILES)
    encoding = Encoding(
        lambda record, where: (parse_text(record, where), where),
        TextEncoder(tokenizer, pt_args.block_size),
        limits={"block_size": pt_args.block_size},
        tokenizer=tokenizer,
        counts_blocks=True,
        packed_to=None if padded else pt_args.block_size,
    )
    needed = {"train": args.do_train, "validation": args.do_eval}
    if rows_args.streaming:
        splits = read_streamed_splits(loader, encoding, **needed, buffer=rows_args.shuffle_buffer)
    else:
        splits = read_splits(loader, encoding, **needed)
    return splits, tokenizer


def main() -> None:
    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────
    run, model_args, data_args, rows_args, adapter_args, pt_args = start("pt", FLAGS)
    args = run.args
    with run:
        # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────
        check_streaming(args, data_args, rows_args)
        splits, tokenizer = read_data(args, model_args, data_args, rows_args, adapter_args, pt_args)
        run.show_sample(tokenizer, splits.train or splits.validation)
        run.identify(splits.train)

        # ── model and adapter ────────────────────────────────────────────────────────────────────────────────────
        model = load_causal_lm(model_args, tokenizer=tokenizer, deepspeed_zero3=run.zero3)
        rows, collate, how = training_rows(
            splits.train, model, tokenizer, pt_args.block_size, rows_args.packing, adapter_args.padded_because
        )
        if isinstance(rows, Examples) and 0 <= data_args.max_train_samples < len(rows):
            rows = splits.keep_blocks(data_args.max_train_samples)
        if adapter_args.trains_adapter:
            model = attach_adapter(model, adapter_args, "CAUSAL_LM")

        # ── train ────────────────────────────────────────────────────────────────────────────────────────────────
        validation = ValidationSet(splits.validation)
        table = EvaluationTable(validation.wheres, ("nll", "tokens"), language_model_metrics)
        trainer = PTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=validation if args.do_eval else None,
            data_collator=collate,
            compute_metrics=table,
            processing_class=tokenizer,
            neft_alpha=rows_args.neft_alpha,
            router=router_loss(model, model_args),
        )
        run.note(rows=how, data=splits.as_dict())
        run.attach(trainer, table)
        run.train(trainer, stop=None)


if __name__ == "__main__":
    main()
