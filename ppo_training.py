r"""Proximal policy optimization: trains a model on the scores that a reward model gives its own responses.

    python ppo_training.py --model_name_or_path outputs/sft-merged --reward_model_name_or_path outputs/rm-merged \
        --train_file_dir data/finetune/train --validation_file_dir data/finetune/validation --output_dir outputs/ppo

    torchrun --nproc_per_node 8 ppo_training.py …                          # eight GPUs
    torchrun --nproc_per_node 8 ppo_training.py --deepspeed zero2.json …   # with DeepSpeed

A rollout: the current policy answers prompts (generate), the reward model scores the responses (score), each token
gets an advantage (estimate_advantages), and the policy is updated on that in minibatches, --ppo_epochs times
(compute_loss). Policy, value head and reference share one set of weights: the reference is the model with its adapter
switched off, or a frozen copy with --use_peft False; the value head reads the last hidden state. Papers: Schulman et
al. 2017 (PPO), Ziegler et al. 2019 (KL penalty).
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
class PPOArguments:
    reward_model_name_or_path: str = field(
        metadata={
            "help": "Reward model: of this project (merged, or its adapter), or any sequence classifier; one without "
            "a chat template is given prompt and answer as a pair of texts."
        }
    )
    reward_label: int | None = field(
        default=None, metadata={"help": "For a classifier with several labels: the label whose logit is the score."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts per rollout and process."})
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Responses per forward pass and process; default: --per_device_train_batch_size."},
    )
    ppo_epochs: int = field(default=4, metadata={"help": "Optimization epochs over each rollout."})
    rollouts: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts of the run. Or --max_steps, which counts optimizer steps: a rollout has --ppo_epochs * "
            "--batch_size / --mini_batch_size / --gradient_accumulation_steps. Or --num_train_epochs: passes over "
            "the prompts."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; also applied to log-probabilities and KL."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Nucleus sampling: smallest set of tokens whose probabilities sum to this."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this many most likely tokens; 0 = all."})
    init_kl_coef: float = field(
        default=0.2, metadata={"help": "Initial KL coefficient: reward subtracted per nat of KL to the reference."}
    )
    adap_kl_ctrl: bool = field(
        default=True,
        metadata={"help": "Adapt the KL coefficient after each rollout towards --target_kl; False: keep it fixed."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Target KL in nats per response (default 6). The adaptive controller steers towards "
            "it; with --early_stopping, also the KL to the sampling policy at which updates on a rollout stop."
        },
    )
    early_stopping: bool = field(
        default=False,
        metadata={
            "help": "Skip the remaining updates on a rollout once the policy's KL to the sampling policy "
            "exceeds --target_kl."
        },
    )
    reward_baseline: float | None = field(
        default=None,
        metadata={
            "help": "Constant subtracted from every score. Without it, scores are whitened over the "
            "rollout of all processes."
        },
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Penalty subtracted from the score of a response without an end token."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor gamma."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value function."})
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    eval_answers: int = field(
        default=1, metadata={"help": "Responses per validation prompt; its metrics are their means."}
    )


FLAGS = [
    ModelArguments,
    DataArguments,
    ChatArguments,
    PairArguments,
    AdapterArguments,
    PredecessorArguments,
    PPOArguments,
]
if __name__ == "__main__":
    first_look(FLAGS, __doc__, stage=True)  # report a wrong flag or path before torch is imported

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.adapters.attach import attach_adapter
from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.select import choose_template
from stagewise.data.examples import IGNORE_INDEX, Example
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Splits
from stagewise.formats.parsers import Conversation
from stagewise.formats.readers import RECORD_FILES
from stagewise.inference.sampling import ROLLOUT, Sampling, adapters_folded, random_numbers, repetition, sample_answers
from stagewise.losses import adapted_kl_coef, gae, kl_to_older, moments, ppo_policy_loss, value_loss, whiten
from stagewise.models.config import load_config
from stagewise.models.loading import load_causal_lm
from stagewise.models.router_loss import BalancesExperts, RouterLoss, router_loss
from stagewise.models.tokenizer import load_tokenizer
from stagewise.rl.evaluation import COLUMNS, answer_metrics
from stagewise.rl.policy import Batch, Policy
from stagewise.rl.reward_model import Scorer, load_scorer
from stagewise.rl.rollout import RolloutEnds, RolloutTrainer, end_ids, read_prompts
from stagewise.rl.schedule import Schedule, settle_batches
from stagewise.training.evaluation_set import EvaluationTable, ValidationSet
from stagewise.training.resume.checkpoint_dir import check_predecessor, merge_predecessor
from stagewise.training.run import Run
from stagewise.training.settings import StageArguments
from stagewise.training.start import start


class PPOTrainer(BalancesExperts, RolloutTrainer):
    def __init__(
        self,
        *args: Any,
        ppo: PPOArguments,
        max_target_length: int,
        scorer: Scorer,
        conversations: dict[str, dict[str, Conversation]],
        policy: Policy,
        router: RouterLoss | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, kl_coef=ppo.init_kl_coef, **kwargs)
        self.ppo, self.scorer, self.policy, self.router = ppo, scorer, policy, router
        self.max_target_length, self.conversations = max_target_length, conversations
        self.eval_answers = ppo.eval_answers
        # KL to the rollout's policy in nats per response, of each update
        self.moved = torch.zeros((), device=self.args.device)

    def rollout(self) -> list[Batch]:
        self.model.eval()
        rows = self.next_rows()
        prompts = [self.train_dataset[row] for row in rows]
        answers = self.generate(prompts, [(ROLLOUT, self.rollouts, row) for row in rows])
        scores = self.score("train", prompts, answers)
        batches = self.in_learning_order(self.estimate_advantages(prompts, answers, scores))
        self.rollouts += 1
        return batches

    # ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(self, prompts: Sequence[Example], keys: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """A response of the current policy to each prompt; a key identifies the response's random numbers."""
        numbers = random_numbers([(self.args.seed, *key) for key in keys], self.max_target_length)
        with adapters_folded(self.model):
            return sample_answers(self.model, [prompt.input_ids for prompt in prompts], numbers, self.sampling)

    # ── score ────────────────────────────────────────────────────────────────────────────────────────────────────

    def score(self, split: str, prompts: Sequence[Example], answers: Sequence[list[int]]) -> torch.Tensor:
        """The reward model's score of each response: (B,)."""
        conversations = [self.conversations[split][prompt.where] for prompt in prompts]
        return self.scorer(conversations, [prompt.input_ids for prompt in prompts], answers).to(self.args.device)

    # ── estimate advantages ──────────────────────────────────────────────────────────────────────────────────────

    def estimate_advantages(
        self, prompts: Sequence[Example], answers: Sequence[list[int]], scores: torch.Tensor
    ) -> list[Batch]:
        """Minibatches with each token's old log-probability and value, its advantage and its return, (N,) each."""
        ppo, lengths = self.ppo, [len(answer) for answer in answers]
        batches = self.batches_of(prompts, answers)
        logps, values, reference = (torch.cat(parts) for parts in zip(*map(self.judge, batches), strict=True))
        nats = logps - reference

        # Reward: the KL penalty at each token, plus the score at the last one.
        scored = scores - ppo.missing_eos_penalty * ~self.ended(answers)
        whitened = ppo.reward_baseline is None
        scored = whiten(scored, self.over_processes(moments(scored))) if whitened else scored - ppo.reward_baseline
        rewards = -self.kl_coef * nats
        rewards[torch.tensor(lengths, device=rewards.device).cumsum(0) - 1] += scored

        rows = [flat.split(lengths) for flat in (rewards, values, torch.ones_like(values))]
        rewards, expected, mask = (pad_sequence(list(row), batch_first=True) for row in rows)
        advantages, returns = (part[mask.bool()] for part in gae(rewards, expected, mask, ppo.gamma, ppo.lam))
        advantages = whiten(advantages, self.over_processes(moments(advantages)))
        tokens = {"old_logps": logps, "old_values": values, "advantages": advantages, "returns": returns}
        sizes = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
        for name, flat in tokens.items():
            for batch, part in zip(batches, flat.split(sizes), strict=True):
                batch[name] = part
        self.see_rollout(answers, scores, nats.sum())
        return batches

    def see_rollout(self, answers: Sequence[list[int]], scores: torch.Tensor, nats: torch.Tensor) -> None:
        """Adds a rollout to the next log entry, and adapts the KL coefficient."""
        total, count = self.over_processes(torch.stack([nats, nats.new_tensor(len(answers))])).tolist()
        self.meter.add(
            reward=scores,
            reward_squared=scores.double().square(),
            kl=scores.new_tensor([total / count]),
            kl_coef=scores.new_tensor([self.kl_coef]),
            length=scores.new_tensor([len(answer) for answer in answers]),
            repetition=scores.new_tensor([repetition(answer) for answer in answers]),
            ended=self.ended(answers),
        )
        if self.ppo.adap_kl_ctrl and math.isfinite(total):  # otherwise the coefficient would be lost
            self.kl_coef = adapted_kl_coef(self.kl_coef, total / count, self.ppo.target_kl)

    # ── update ───────────────────────────────────────────────────────────────────────────────────────────────────

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Clipped policy and value losses: the mean over the response tokens of a whole update, on all processes."""
        logps, values = self.policy.logps_and_values(model, inputs)
        policy, clipped = ppo_policy_loss(logps, inputs["old_logps"], inputs["advantages"], self.ppo.cliprange)
        value = value_loss(values, inputs["old_values"], inputs["returns"], self.ppo.cliprange_value)
        mean = self.accelerator.num_processes / num_items_in_batch
        loss = (policy.sum() + self.ppo.vf_coef * value.sum()) * mean + self.router_share()
        self.meter.add(policy_loss=policy, value_loss=value, clip_fraction=clipped)
        self.moved += kl_to_older(logps.detach(), inputs["old_logps"]).sum()
        return self.guard.watch(loss)

    def end_update(self) -> None:
        """--early_stopping: skips the rollout's remaining updates once the policy has moved by --target_kl."""
        if self.ppo.early_stopping and self.queue:
            answers = self.schedule.mini_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            moved = float(self.over_processes(self.moved)) / answers
            if moved > self.ppo.target_kl:
                logger.info(
                    f"rollout {self.rollouts}: {moved:.3g} nats per response away; its other updates are left out"
                )
                self.queue.clear()
        self.moved.zero_()

    # ── what several steps need ──────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def judge(self, batch: Batch, *temperatures: float) -> tuple[torch.Tensor, ...]:
        """Log-probabilities and values of the policy, then the reference's log-probabilities: (N,) each.

        The reference's are computed at the policy's temperature, and at each of `temperatures`.
        """
        with self.compute_loss_context_manager():
            reference = self.policy.reference_logps
            return *self.policy.logps_and_values(self.model, batch), *reference(batch, *temperatures)


def check_arguments(run: Run, ppo: PPOArguments) -> None:
    """Raises ArgumentError for flags that don't fit together, before anything is read; fills in defaults."""
    if run.zero3:
        raise ArgumentError("--deepspeed: answers cannot be sampled from partitioned weights (ZeRO-3); use zero2.json")
    positive = ("batch_size", "ppo_epochs", "temperature", "cliprange", "cliprange_value", "rollouts", "target_kl")
    for name in (*positive, "eval_answers"):
        if (value := getattr(ppo, name)) is not None and not value > 0:  # nan is not
            raise ArgumentError(f"--{name}: expected more than 0, found {value}")
    for name in ("top_k", "init_kl_coef", "vf_coef", "missing_eos_penalty"):
        if not 0 <= getattr(ppo, name) < math.inf:
            raise ArgumentError(f"--{name}: expected 0 or more, found {getattr(ppo, name)}")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(ppo, name) <= 1:
            raise ArgumentError(f"--{name}: expected 0 to 1, found {getattr(ppo, name)}")
    if not 0 < ppo.top_p <= 1:
        raise ArgumentError(f"--top_p: expected above 0, at most 1 (all tokens), found {ppo.top_p}")
    if not math.isfinite(ppo.reward_baseline or 0):
        raise ArgumentError(f"--reward_baseline: expected a finite number, found {ppo.reward_baseline}")
    ppo.mini_batch_size = settle_batches(
        run.args, run.manifest["flags"], ppo.batch_size, ppo.mini_batch_size, ppo.ppo_epochs, ppo.rollouts
    )
    if ppo.target_kl and not (ppo.adap_kl_ctrl or ppo.early_stopping):
        raise ArgumentError("--target_kl has no effect without --adap_kl_ctrl or --early_stopping: leave it out")
    if ppo.reward_baseline is None and ppo.batch_size * run.args.world_size == 1:
        raise ArgumentError("--batch_size 1: one score cannot be whitened; give more prompts, or --reward_baseline")
    ppo.target_kl = ppo.target_kl or 6.0


def read_data(
    args: StageArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    chat_args: ChatArguments,
    pair_args: PairArguments,
    adapter_args: AdapterArguments,
    predecessor_args: PredecessorArguments,
) -> tuple[Splits, PreTrainedTokenizerBase, AnyTemplate, dict[str, dict[str, Conversation]]]:
    """Encoded prompts, tokenizer, chat template and the conversations; `python -m tools.show_data` shows them."""
    load_config(model_args)  # a wrong --model_type or an unknown architecture fails here, before any data is read
    tokenizer = load_tokenizer(model_args)
    earlier = predecessor_args.checkpoint_dir or adapter_args.peft_path
    template = choose_template(tokenizer, chat_args, earlier)
    loader = SplitLoader(data_args, model_args, args, RECORD_FILES)
    splits, conversations = read_prompts(loader, args, tokenizer, template, pair_args.max_source_length)
    return splits, tokenizer, template, conversations


def main() -> None:
    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────
    run, model_args, data_args, chat_args, pair_args, adapter_args, predecessor_args, ppo_args = start("ppo", FLAGS)
    args = run.args
    with run:
        check_arguments(run, ppo_args)
        check_predecessor(run, predecessor_args, adapter_args)

        # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────
        splits, tokenizer, template, conversations = read_data(
            args, model_args, data_args, chat_args, pair_args, adapter_args, predecessor_args
        )
        schedule = Schedule.plan(
            args, ppo_args.batch_size, ppo_args.mini_batch_size, ppo_args.ppo_epochs, ppo_args.rollouts, splits.train
        )
        run.show_sample(tokenizer, splits.train or splits.validation)
        run.identify(splits.train, template)

        # ── reward model, policy and reference ───────────────────────────────────────────────────────────────────
        scorer = load_scorer(
            ppo_args.reward_model_name_or_path,
            model_args,
            label=ppo_args.reward_label,
            tokenizer=tokenizer,
            template=template,
            device=args.device,
            longest=max(part.lengths["max"] for part in splits.summary.values()) + pair_args.max_target_length,
        )
        model = merge_predecessor(run, predecessor_args, load_causal_lm(model_args, tokenizer=tokenizer))
        if adapter_args.trains_adapter:
            model, reference = attach_adapter(model, adapter_args, "CAUSAL_LM"), None
        else:
            reference = copy.deepcopy(model).eval().requires_grad_(False).to(args.device)

        # ── train ────────────────────────────────────────────────────────────────────────────────────────────────
        stop_ids = end_ids(tokenizer, template.stops)
        sampling = Sampling(ppo_args.temperature, ppo_args.top_p, ppo_args.top_k, stop_ids, tokenizer.pad_token_id)
        validation = ValidationSet(splits.validation)
        table = EvaluationTable(validation.wheres, COLUMNS, answer_metrics)
        trainer = PPOTrainer(
            model=model,
            args=args,
            train_dataset=splits.train,
            eval_dataset=validation if args.do_eval else None,
            compute_metrics=table,
            processing_class=tokenizer,
            schedule=schedule,
            ppo=ppo_args,
            sampling=sampling,
            max_target_length=pair_args.max_target_length,
            scorer=scorer,
            conversations=conversations,
            policy=Policy(model, reference, ppo_args.temperature),
            router=router_loss(model, model_args),
        )
        run.note(template=template.name, data=splits.as_dict())
        run.attach(trainer, table)
        trainer.add_callback(RolloutEnds(trainer))
        run.train(trainer, stop=template.stops)


if __name__ == "__main__":
    main()
