r"""Reward modeling: trains a model with a scalar head to score the answer that people prefer higher.

    python reward_modeling.py --model_name_or_path outputs/sft-merged --output_dir outputs/rm \
        --train_file_dir data/reward/train --validation_file_dir data/reward/validation

    torchrun --nproc_per_node 8 reward_modeling.py …                          # eight GPUs
    torchrun --nproc_per_node 8 reward_modeling.py --deepspeed zero2.json …   # with DeepSpeed

A record is a prompt with a chosen and a rejected answer. Both are rendered by the chat template and scored at their
end marker; the loss is -log sigmoid(score of chosen - score of rejected). --per_device_train_batch_size counts pairs.
The score's head is trained in full and saved with the adapter; `merge_peft_adapter.py` folds both into the model.
"""

from __future__ import annotations

from stagewise.config.arguments import AdapterArguments, ChatArguments, DataArguments, ModelArguments, PairArguments
from stagewise.training.first_look import first_look

FLAGS = [ModelArguments, DataArguments, ChatArguments, PairArguments, AdapterArguments]
if __name__ == "__main__":
    first_look(FLAGS, __doc__, stage=True)  # report a wrong flag or path before torch is imported


from loguru import logger
from transformers import PreTrainedTokenizerBase

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.adapters.attach import attach_adapter
from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.reward_template import is_older_reward_model, older_notice, settle_reward_form
from stagewise.chat.select import choose_template
from stagewise.data.packing import PreferenceCollator
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Splits
from stagewise.formats.readers import RECORD_FILES
from stagewise.losses import pairwise_loss
from stagewise.models.config import load_config
from stagewise.models.loading import load_reward_model
from stagewise.models.tokenizer import load_tokenizer
from stagewise.training.evaluation_set import EvaluationTable, ValidationSet, WithIndex
from stagewise.training.metrics import pair_metrics
from stagewise.training.pair_trainer import PairTrainer, read_pairs
from stagewise.training.settings import StageArguments
from stagewise.training.start import start


class RewardTrainer(PairTrainer):
    def rewards(self, model, inputs):
        """The scores at each row's end marker, its last non-padding token: (2B, T) -> (B,), (B,)."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return output.logits.squeeze(-1).float().chunk(2)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean pairwise loss over the pairs of the whole batch, on all processes."""
        chosen, rejected = self.rewards(model, inputs)
        loss = pairwise_loss(chosen, rejected).sum() / num_items_in_batch * self.accelerator.num_processes
        self.see(chosen, rejected)
        return self.guard.watch(loss)


def read_data(
    args: StageArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    chat_args: ChatArguments,
    pair_args: PairArguments,
    adapter_args: AdapterArguments,
) -> tuple[Splits, PreTrainedTokenizerBase, AnyTemplate]:
    """Encoded pairs of answers, the tokenizer and the chat template; `python -m tools.show_data` shows them."""
    config = load_config(model_args)  # a wrong --model_type or an unknown architecture fails here, before data is read
    tokenizer = load_tokenizer(model_args)
    earlier = [p for p in (model_args.model_name_or_path, adapter_args.peft_path, args.resume_from_checkpoint) if p]
    older = [path for path in earlier if is_older_reward_model(path)]
    template = choose_template(tokenizer, chat_args, adapter_args.peft_path)
    for path in older:
        logger.warning(f"{older_notice(path, tokenizer, template)}; this run trains it at the end marker")
    ending = settle_reward_form(tokenizer, template, config.get_text_config().vocab_size)
    loader = SplitLoader(data_args, model_args, args, RECORD_FILES)
    splits = read_pairs(loader, args, tokenizer, template, pair_args, ending)
    return splits, tokenizer, template


def main() -> None:
    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────
    run, model_args, data_args, chat_args, pair_args, adapter_args = start("rm", FLAGS)
    args = run.args
    with run:
        # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────
        splits, tokenizer, template = read_data(args, model_args, data_args, chat_args, pair_args, adapter_args)
        run.show_sample(tokenizer, splits.train or splits.validation)
        run.identify(splits.train, template)

        # ── model and adapter ────────────────────────────────────────────────────────────────────────────────────
        float32_head = adapter_args.trains_adapter or not run.zero3
        model = load_reward_model(model_args, tokenizer, deepspeed_zero3=run.zero3, float32_head=float32_head)
        if adapter_args.trains_adapter:
            model = attach_adapter(model, adapter_args, "SEQ_CLS")

        # ── train ────────────────────────────────────────────────────────────────────────────────────────────────
        validation = ValidationSet(splits.validation)
        table = EvaluationTable(validation.wheres, ("chosen", "rejected"), pair_metrics)
        trainer = RewardTrainer(
            model=model,
            args=args,
            train_dataset=splits.train,
            eval_dataset=validation if args.do_eval else None,
            data_collator=WithIndex(PreferenceCollator(tokenizer.pad_token_id), rows=False),
            compute_metrics=table,
            processing_class=tokenizer,
        )
        run.note(template=template.name, data=splits.as_dict())
        run.attach(trainer, table)
        run.train(trainer, stop=template.stops)


if __name__ == "__main__":
    main()
