r"""Direct preference optimization: trains a model on preferences, without a reward model.

    python dpo_training.py --model_name_or_path outputs/sft-merged --output_dir outputs/dpo \
        --train_file_dir data/reward/train --validation_file_dir data/reward/validation

    torchrun --nproc_per_node 8 dpo_training.py …                          # eight GPUs
    torchrun --nproc_per_node 8 dpo_training.py --deepspeed zero2.json …   # with DeepSpeed

A record is a prompt with a chosen and a rejected answer. The implicit reward of an answer is beta times the difference
between its log-probability under the model and under the reference. The reference is the same model with its adapter
switched off, or a frozen copy with --use_peft False. --per_device_train_batch_size counts pairs. Paper: Rafailov et
al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewise.config.arguments import (
    AdapterArguments,
    ChatArguments,
    DataArguments,
    ModelArguments,
    PairArguments,
    PredecessorArguments,
)
from stagewise.errors import ArgumentError
from stagewise.training.first_look import first_look


@dataclass
class DPOArguments:
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the reference model."})
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reference model for full training; default: a frozen copy of the initial model."},
    )

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise ArgumentError(f"--beta: expected a number above 0, found {self.beta}")


FLAGS = [
    ModelArguments,
    DataArguments,
    ChatArguments,
    PairArguments,
    AdapterArguments,
    PredecessorArguments,
    DPOArguments,
]
if __name__ == "__main__":
    first_look(FLAGS, __doc__, stage=True)  # report a wrong flag or path before torch is imported

from copy import copy
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.adapters.attach import attach_adapter
from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.select import choose_template
from stagewise.data.packing import PreferenceCollator
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Splits
from stagewise.formats.readers import RECORD_FILES
from stagewise.losses import dpo_loss, sequence_logps
from stagewise.models.config import load_config
from stagewise.models.forward import label_logits, takes_kept_logits
from stagewise.models.hub import find_source, refuse_adapter
from stagewise.models.loading import load_causal_lm
from stagewise.models.router_loss import BalancesExperts, RouterLoss, router_loss
from stagewise.models.tokenizer import load_tokenizer
from stagewise.training.evaluation_set import EvaluationTable, ValidationSet, WithIndex
from stagewise.training.metrics import pair_metrics
from stagewise.training.pair_trainer import PairTrainer, read_pairs
from stagewise.training.resume.checkpoint_dir import check_predecessor, merge_predecessor
from stagewise.training.sample_generations import choose_examples, generate_samples
from stagewise.training.settings import StageArguments
from stagewise.training.start import start


class DPOTrainer(BalancesExperts, PairTrainer):
    def __init__(
        self, *args, beta: float, reference: PreTrainedModel | None, router: RouterLoss | None = None, **kwargs
    ):
        """`reference`: None means the model with its adapter switched off."""
        super().__init__(*args, **kwargs)
        self.beta, self.router = beta, router
        self.keep_logits = takes_kept_logits(self.model) and (reference is None or takes_kept_logits(reference))
        self.reference = None if reference is None else prepare_reference(reference, self.accelerator)
        self.known = {}  # reference log-probabilities of validation batches, by their pairs' indices

    def logps(self, model, inputs):
        """Log-probabilities of the answers, summed over tokens: (2B, T) -> (B,), (B,)."""
        return sequence_logps(*label_logits(model, inputs, self.keep_logits)).chunk(2)

    @torch.no_grad()
    def reference_logps(self, inputs):
        """The same under the reference, without gradient or dropout."""
        # Bypasses the wrapper of DDP or DeepSpeed, which would count this pass as the step's own; hence autocast.
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            if self.reference is not None:
                return self.logps(self.reference, inputs)
            was_training = model.training
            with model.eval().disable_adapter():
                logps = self.logps(model, inputs)
            model.train(was_training)
        return logps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean DPO loss over the pairs of the whole batch on all processes."""
        reference = self.reference_logps(inputs)
        losses, chosen, rejected = dpo_loss(*self.logps(model, inputs), *reference, self.beta)
        loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes + self.router_share()
        self.see(chosen, rejected)
        return self.guard.watch(loss)

    def rewards(self, model, inputs):
        """Implicit rewards of validation pairs; the reference's log-probabilities are computed once and kept."""
        pairs = tuple(inputs["index"].tolist())
        if pairs not in self.known:
            self.known[pairs] = self.reference_logps(inputs)
        return dpo_loss(*self.logps(model, inputs), *self.known[pairs], self.beta)[1:]

    def eval_samples(self, count, stops, synced=False):
        """Samples answers to a few validation prompts, and the implicit rewards of their pairs."""
        pairs = super().eval_samples(count, stops, synced)
        own = generate_samples(self, choose_examples(self, count), stops, synced)
        return [replace(pair, texts=[answer.texts[0], *pair.texts]) for pair, answer in zip(pairs, own, strict=True)]


def prepare_reference(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Freezes the reference and moves it to the device; under DeepSpeed, into an engine without an optimizer."""
    model.eval().requires_grad_(False)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return model if hasattr(model, "hf_device_map") else model.to(accelerator.device)
    import deepspeed

    # Partitioned if the model is (ZeRO-3), in the precision that the model's engine uses.
    zero = plugin.deepspeed_config["zero_optimization"]
    kept = ("stage", "offload_param") if zero["stage"] == 3 else ()
    config = {k: plugin.deepspeed_config[k] for k in ("bf16", "fp16") if k in plugin.deepspeed_config}
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {k: zero[k] for k in kept if k in zero}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def check_reference(dpo: DPOArguments, model: ModelArguments, adapter: AdapterArguments) -> None:
    """Raises ArgumentError if --ref_model_name_or_path has no effect or names no model."""
    flag, name = "ref_model_name_or_path", dpo.ref_model_name_or_path
    if name and adapter.trains_adapter:
        way_out = "leave it out, or train all weights with --use_peft False"
        raise ArgumentError(f"--{flag} has no effect: the reference is the model without its adapter; {way_out}")
    if name:
        refuse_adapter(find_source(name, model, flag), flag)


def read_data(
    args: StageArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    chat_args: ChatArguments,
    pair_args: PairArguments,
    adapter_args: AdapterArguments,
    predecessor_args: PredecessorArguments,
) -> tuple[Splits, PreTrainedTokenizerBase, AnyTemplate]:
    """Encoded pairs of answers, the tokenizer and the chat template; `python -m tools.show_data` shows them."""
    load_config(model_args)  # a wrong --model_type or an unknown architecture fails here, before any data is read
    tokenizer = load_tokenizer(model_args)
    earlier = predecessor_args.checkpoint_dir or adapter_args.peft_path
    template = choose_template(tokenizer, chat_args, earlier)
    loader = SplitLoader(data_args, model_args, args, RECORD_FILES)
    splits = read_pairs(loader, args, tokenizer, template, pair_args)
    return splits, tokenizer, template


def main() -> None:
    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────
    run, model_args, data_args, chat_args, pair_args, adapter_args, predecessor_args, dpo_args = start("dpo", FLAGS)
    args = run.args
    with run:
        check_predecessor(run, predecessor_args, adapter_args)
        check_reference(dpo_args, model_args, adapter_args)

        # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────
        splits, tokenizer, template = read_data(
            args, model_args, data_args, chat_args, pair_args, adapter_args, predecessor_args
        )
        run.show_sample(tokenizer, splits.train or splits.validation)
        run.identify(splits.train, template)

        # ── model, adapter and reference ─────────────────────────────────────────────────────────────────────────
        model = load_causal_lm(model_args, tokenizer=tokenizer, deepspeed_zero3=run.zero3)
        model, reference = merge_predecessor(run, predecessor_args, model), None
        if adapter_args.trains_adapter:
            model = attach_adapter(model, adapter_args, "CAUSAL_LM")
        else:
            name = dpo_args.ref_model_name_or_path
            other = copy(model_args)
            other.model_name_or_path, other.router_aux_loss = name or model_args.model_name_or_path, False
            reference = load_causal_lm(other, tokenizer=tokenizer, for_training=False, deepspeed_zero3=run.zero3)
            reference = reference if name else merge_predecessor(run, predecessor_args, reference)

        # ── train ────────────────────────────────────────────────────────────────────────────────────────────────
        validation = ValidationSet(splits.validation)
        table = EvaluationTable(validation.wheres, ("chosen", "rejected"), pair_metrics)
        trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=splits.train,
            eval_dataset=validation if args.do_eval else None,
            data_collator=WithIndex(PreferenceCollator(tokenizer.pad_token_id), rows=False),
            compute_metrics=table,
            processing_class=tokenizer,
            beta=dpo_args.beta,
            reference=reference,
            router=router_loss(model, model_args),
        )
        run.note(template=template.name, data=splits.as_dict())
        run.attach(trainer, table)
        run.train(trainer, stop=template.stops)


if __name__ == "__main__":
    main()
