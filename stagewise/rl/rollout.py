"""Between PPO's steps and transformers' Trainer: batches that are made while training runs, and what waits for their
end.

    rollout 1                     rollout 2
    ├ generate, score …           ├ generate, score …
    ├ update  update  update  ┤   ├ update  update  update  ┤
                              └── here alone: evaluation, checkpoint, stop
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.preference_encoding import PromptEncoder
from stagewise.data.examples import Example
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits
from stagewise.data.statistics import Step, measure, rollout_contents
from stagewise.formats.parsers import Conversation, parse_prompt
from stagewise.inference.sampling import PROMPTS, UPDATES, Sampling
from stagewise.rl.evaluation import EvaluatesAnswers
from stagewise.rl.policy import Batch, answer_batch
from stagewise.rl.schedule import Schedule
from stagewise.training.callbacks import Resumes
from stagewise.training.finiteness import SkipsNonFinite, check_weights
from stagewise.training.throughput import TellsSpeed

STATE = "ppo_state.pt"  # value head, rollouts made and KL coefficient: with each checkpoint, for resuming


def end_ids(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> tuple[int, ...]:
    """The tokens that end an answer: the end markers that are one token, and the tokenizer's own."""
    markers = [tokenizer.encode(stop, add_special_tokens=False) for stop in stops]
    return tuple(sorted({*(ids[0] for ids in markers if len(ids) == 1), tokenizer.eos_token_id} - {None}))


def read_prompts(
    loader: SplitLoader, args: TrainingArguments, tokenizer: Any, template: AnyTemplate, limit: int
) -> tuple[Splits, dict[str, dict[str, Conversation]]]:
    """Conversations as prompts: without their last answer, at most `limit` tokens.

    Returns:
        the encoded prompts, and for "train" and "validation" the conversation behind each prompt, by its place.
    """
    asked: dict[str, list[Conversation]] = {}

    def parse(record: dict[str, Any], where: str) -> Conversation:
        prompt = parse_prompt(record, where)
        asked.setdefault(where, []).append(prompt)
        return prompt

    encoding = Encoding(
        parse,
        PromptEncoder(tokenizer, template, limit),
        limits={"max_source_length": limit},
        tokenizer=tokenizer,
        depends_on={"template": template.jinja()},
        parse_always=True,
    )
    splits = read_splits(loader, encoding, train=args.do_train, validation=args.do_eval)
    # Both splits may have a file of one name; training records are read first.
    first, last = ({where: prompts[n] for where, prompts in asked.items()} for n in (0, -1))
    return splits, {"train": first, "validation": last}


class RolloutTrainer(EvaluatesAnswers, SkipsNonFinite, Resumes, TellsSpeed, Trainer):
    """A Trainer whose training batches come from the model as it is when they are asked for.

    The stage's subclass holds `rollout`, which returns a rollout's minibatches, and `compute_loss`. The model has a
    `value_head`, which is saved beside it and is no part of it.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, schedule: Schedule, sampling: Sampling, kl_coef: float, **kwargs: Any):
        super().__init__(*args, data_collator=lambda items: {"index": torch.tensor([i for i, _ in items])}, **kwargs)
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the answers' tokens of a whole update
        self.schedule, self.sampling, self.kl_coef = schedule, sampling, kl_coef
        self.rollouts = 0  # made so far
        self.queue: list[Batch] = []  # minibatches of this rollout that are still to come
        self.meter = Meter()
        self.answers: list[dict[str, Any]] = []  # of the last evaluation; while it continues, this process's

    def rollout(self) -> list[Batch]:
        """The minibatches of the next rollout in the order in which they are learned; counts `rollouts` up."""
        raise NotImplementedError

    def end_update(self) -> None:
        """Called after each optimizer step; may empty `queue`."""

    def step_contents(self) -> Step:
        """What the prompts of a rollout are."""
        plan, args = self.schedule, self.args
        return rollout_contents(measure(self.train_dataset), plan.batch_size, args.world_size, plan.last)

    def next_rows(self) -> list[int]:
        """This process's prompts of the next rollout, by index; prompts of like lengths are in one minibatch.

        Minibatch k of all processes together is the same prompts, whatever the number of processes.
        """
        count, mini, world = len(self.train_dataset), self.schedule.mini_batch_size, self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size, rows = self.schedule.batch_size * world, []
        for position in range(self.rollouts * size, (self.rollouts + 1) * size):
            passes, place = divmod(position, count)
            if not rows or place == 0:
                order = np.random.default_rng([seed, PROMPTS, passes]).permutation(count)
            rows.append(int(order[place]))
        rows.sort(key=lambda row: len(self.train_dataset[row].input_ids))
        starts = range(self.args.process_index * mini, size, mini * world)
        return [row for first in starts for row in rows[first : first + mini]]

    def in_learning_order(self, batches: list[Batch]) -> list[Batch]:
        """Each minibatch once a pass. It keeps its rows, so that rounding is as when it was made."""
        order = np.random.default_rng([self.args.seed, UPDATES, self.rollouts])
        return [batches[i] for _ in range(self.schedule.passes) for i in order.permutation(len(batches))]

    def batches_of(self, prompts: Sequence[Example], answers: Sequence[list[int]]) -> list[Batch]:
        """Prompts with their answers as minibatches on the device."""
        ids, size = [prompt.input_ids for prompt in prompts], self.schedule.mini_batch_size
        spans = [slice(first, first + size) for first in range(0, len(ids), size)]
        batches = [answer_batch(ids[span], answers[span], self.sampling.pad_id) for span in spans]
        on_device = [{name: value.to(self.args.device) for name, value in batch.items()} for batch in batches]
        return [
            {**batch, "where": [p.where for p in prompts[span]]} for batch, span in zip(on_device, spans, strict=True)
        ]

    def ended(self, answers: Sequence[list[int]]) -> torch.Tensor:
        """Which answers ended by themselves: (B,) bool."""
        return torch.tensor([answer[-1] in self.sampling.stop_ids for answer in answers], device=self.args.device)

    def over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, "sum")

    def get_train_dataloader(self) -> RolloutBatches:
        return RolloutBatches(self)

    def _prepare_inputs(self, inputs):
        return inputs  # on the device already; under DeepSpeed transformers would round the log-probabilities

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the meter has seen since the last log to a training log."""
        if "loss" in logs:
            seen = self.meter.read(self.over_processes)
            if "reward" in seen:
                seen["reward_std"] = math.sqrt(max(seen.pop("reward_squared") - seen["reward"] ** 2, 0))
            logs.update(seen)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is None and not hasattr(self.model, "peft_config"):
            state_dict = self.model.state_dict()
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith("value_head.")}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            head = {name: value.detach().cpu() for name, value in self.model.value_head.state_dict().items()}
            state = {"value_head": head, "rollouts": self.rollouts, "kl_coef": self.kl_coef}
            torch.save(state, Path(output_dir or self.args.output_dir) / STATE)

    def place(self) -> dict[str, int]:
        """What a checkpoint keeps of the place in the prompts."""
        return {"rollouts": self.rollouts}

    def steps_left(self, checkpoint: Path) -> int:
        """The rollouts behind a checkpoint that the flags ask for; below 0 where it is beyond their end."""
        return self.schedule.last - saved_state(checkpoint)["rollouts"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        if not self.queue and self.rollouts >= self.schedule.last:  # resumed behind the last one
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        if resume_from_checkpoint:
            state = saved_state(resume_from_checkpoint)
            self.model.value_head.load_state_dict(state["value_head"])
            self.rollouts, self.kl_coef = state["rollouts"], state["kl_coef"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def saved_state(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint holds beside transformers' own: value head, rollouts made, KL coefficient."""
    return torch.load(Path(checkpoint) / STATE, map_location="cpu", weights_only=True)


class RolloutBatches:
    """The training dataloader. An epoch is a number of rollouts, within which a resumed run continues."""

    def __init__(self, trainer: RolloutTrainer):
        self.trainer, self.dataset = trainer, trainer.train_dataset

    def __len__(self) -> int:
        return self.trainer.schedule.an_epoch * self.trainer.schedule.minibatches

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.trainer
        for _ in range(trainer.schedule.an_epoch - trainer.rollouts % trainer.schedule.an_epoch):
            started = time.time()
            trainer.start_clock()
            check_weights(trainer.model, trainer.state.global_step)  # others give no answers
            trainer.queue[:] = trainer.rollout()
            if trainer.rollouts == 1:
                logger.info(f"first rollout: {time.time() - started:.1f} s before its updates")
            while trainer.queue:
                yield trainer.queue.pop(0)


class RolloutEnds(TrainerCallback):
    """Lets evaluation, checkpoints and the end of training wait until a rollout has been learned from.

    A checkpoint then needs no half-used rollout to be resumed from. To be added after all other callbacks.
    """

    WAIT = ("should_evaluate", "should_save", "should_training_stop")

    def __init__(self, trainer: RolloutTrainer):
        self.trainer = trainer
        self.waiting: set[str] = set()

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.end_update()
        # transformers counts from the start of a resumed epoch, and updates that were left out not at all
        state.epoch = trainer.rollouts / trainer.schedule.an_epoch
        if not trainer.queue and trainer.rollouts >= trainer.schedule.last:
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
        self._let_wait(control, not trainer.queue or state.global_step >= state.max_steps)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._let_wait(control, not self.trainer.queue)

    def _let_wait(self, control, ended: bool) -> None:
        self.waiting |= {name for name in self.WAIT if getattr(control, name)}
        for name in self.WAIT:
            setattr(control, name, ended and name in self.waiting)
        if ended:
            self.waiting.clear()


class Meter:
    """Means of numbers since they were last read, over all processes."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, **values: torch.Tensor) -> None:
        """Counts each tensor's numbers under its name."""
        for name, numbers in values.items():
            numbers = numbers.detach().double()
            seen = torch.stack([numbers.sum(), torch.full_like(numbers.sum(), numbers.numel())])
            self.sums[name] = self.sums[name] + seen if name in self.sums else seen

    def read(self, over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means by name; counting then begins anew.

        Args:
            over_processes: adds a tensor up over all processes, each of which has counted under the same names.
        """
        if not self.sums:
            return {}
        sums = over_processes(torch.stack(list(self.sums.values())))
        means = dict(zip(self.sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        self.sums.clear()
        return means
