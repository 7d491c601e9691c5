r"""Supervised finetuning: trains a model on the assistant turns of conversations.

    python supervised_finetuning.py --model_name_or_path models/SmolLM2-135M-Instruct --output_dir outputs/sft \
        --train_file_dir data/finetune/train --validation_file_dir data/finetune/validation

    torchrun --nproc_per_node 8 supervised_finetuning.py …                          # eight GPUs
    torchrun --nproc_per_node 8 supervised_finetuning.py --deepspeed zero2.json …   # with DeepSpeed

Conversations are rendered with the chat template. Only the assistant turns and their end markers have labels; several
conversations share a row and do not attend to each other. The adapter is written to --output_dir;
`merge_peft_adapter.py` folds it into the model for the next stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewise.config.arguments import (
    AdapterArguments,
    ChatArguments,
    DataArguments,
    LanguageModelArguments,
    ModelArguments,
)
from stagewise.errors import ArgumentError
from stagewise.training.first_look import first_look


@dataclass
class SFTArguments:
    model_max_length: int = field(
        default=2048, metadata={"help": "Maximum tokens of a conversation, and of a packed row."}
    )
    train_on_inputs: bool = field(
        default=False, metadata={"help": "Compute the loss on the whole conversation, including prompts."}
    )
    mask_history: bool = field(
        default=False, metadata={"help": "Compute the loss only on the response to the last question."}
    )
    use_firefly_loss: bool | None = field(
        default=None,
        metadata={"help": "Accepted for older commands; the loss is always computed on every assistant turn."},
    )
    truncation_side: str = field(
        default="right",
        metadata={
            "help": "Side from which whole turns of a conversation that is too long are dropped: right or left."
        },
    )


FLAGS = [ModelArguments, DataArguments, ChatArguments, LanguageModelArguments, AdapterArguments, SFTArguments]
if __name__ == "__main__":
    first_look(FLAGS, __doc__, stage=True)  # report a wrong flag or path before torch is imported


from transformers import PreTrainedTokenizerBase

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.adapters.attach import attach_adapter
from stagewise.chat.encoding import AnyTemplate, ConversationEncoder
from stagewise.chat.select import choose_template
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits
from stagewise.data.streaming.splits import read_streamed_splits
from stagewise.formats.parsers import parse_conversation
from stagewise.formats.readers import RECORD_FILES
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


class SFTTrainer(LanguageModelTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean negative log-likelihood of the tokens with labels of the whole batch, on all processes."""
        nll, _ = self.token_losses(model, inputs)
        loss = nll.sum() / num_items_in_batch * self.accelerator.num_processes + self.router_share()
        return self.guard.watch(loss)


def check_labels(sft: SFTArguments) -> None:
    """Raises ArgumentError for label flags that contradict each other or have no effect."""
    if sft.use_firefly_loss is False:
        raise ArgumentError(
            "--use_firefly_loss False: all assistant turns of a conversation have labels in one pass; there is no "
            "other loss. To train on the last turn only, give --mask_history"
        )
    if sft.use_firefly_loss and sft.mask_history:
        raise ArgumentError("--use_firefly_loss trains on every turn, --mask_history only on the last: give one")
    if sft.use_firefly_loss and sft.train_on_inputs:
        raise ArgumentError("--use_firefly_loss trains only on answers, --train_on_inputs on questions, too: give one")


def read_data(
    args: StageArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    chat_args: ChatArguments,
    rows_args: LanguageModelArguments,
    adapter_args: AdapterArguments,
    sft_args: SFTArguments,
) -> tuple[Splits, PreTrainedTokenizerBase, AnyTemplate]:
    """Encoded conversations, the tokenizer and the chat template; `python -m tools.show_data` shows them."""
    check_labels(sft_args)
    labels = (sft_args.train_on_inputs, sft_args.mask_history, sft_args.truncation_side)
    load_config(model_args)  # a wrong --model_type or an unknown architecture fails here, before any data is read
    tokenizer = load_tokenizer(model_args)
    template = choose_template(tokenizer, chat_args, adapter_args.peft_path)
    loader = SplitLoader(data_args, model_args, args, RECORD_FILES)
    encoding = Encoding(
        parse_conversation,
        ConversationEncoder(tokenizer, template, sft_args.model_max_length, *labels),
        limits={"model_max_length": sft_args.model_max_length},
        tokenizer=tokenizer,
        depends_on={"template": template.jinja(), "labels": labels},
    )
    needed = {"train": args.do_train, "validation": args.do_eval}
    if rows_args.streaming:
        splits = read_streamed_splits(loader, encoding, **needed, buffer=rows_args.shuffle_buffer)
    else:
        splits = read_splits(loader, encoding, **needed)
    return splits, tokenizer, template


def main() -> None:
    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────
    run, model_args, data_args, chat_args, rows_args, adapter_args, sft_args = start("sft", FLAGS)
    args, limit = run.args, sft_args.model_max_length
    with run:
        # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────
        check_streaming(args, data_args, rows_args)
        splits, tokenizer, template = read_data(
            args, model_args, data_args, chat_args, rows_args, adapter_args, sft_args
        )
        run.show_sample(tokenizer, splits.train or splits.validation)
        run.identify(splits.train, template)

        # ── model and adapter ────────────────────────────────────────────────────────────────────────────────────
        model = load_causal_lm(model_args, tokenizer=tokenizer, deepspeed_zero3=run.zero3)
        rows, collate, how = training_rows(
            splits.train, model, tokenizer, limit, rows_args.packing, adapter_args.padded_because
        )
        if adapter_args.trains_adapter:
            model = attach_adapter(model, adapter_args, "CAUSAL_LM")

        # ── train ────────────────────────────────────────────────────────────────────────────────────────────────
        validation = ValidationSet(splits.validation)
        table = EvaluationTable(validation.wheres, ("nll", "tokens"), language_model_metrics)
        trainer = SFTTrainer(
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
        run.note(template=template.name, rows=how, data=splits.as_dict())
        run.attach(trainer, table)
        run.train(trainer, stop=template.stops)


if __name__ == "__main__":
    main()
