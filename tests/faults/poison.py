"""Breaks chosen optimizer steps of a stage, as an overflow or a faulty device would; also as a command of its own:

    python tests/faults/poison.py 3,4 gradient supervised_finetuning --model_name_or_path …

| kind | what breaks |
| --- | --- |
| gradient | one element of one weight's gradient is NaN, the loss is sound |
| infinite | one element of it is infinite |
| loss | the embeddings are NaN, and with them the loss |
| rate | the learning rate is 1e38: the gradient is sound, the step ends in infinite weights |

In several processes the highest rank alone meets it (`rate`: all).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Collection
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINERS = {
    "pretraining": "PTTrainer",
    "supervised_finetuning": "SFTTrainer",
    "reward_modeling": "RewardTrainer",
    "dpo_training": "DPOTrainer",
    "ppo_training": "PPOTrainer",
}
KINDS = ("gradient", "infinite", "loss", "rate")


def poisoned(trainer: type, at: Collection[int], kind: str) -> type:
    """The stage's Trainer class with the steps `at`, counted from 1, broken."""
    mine = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

    class Poisoned(trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            embeddings = self.model.get_input_embeddings()
            weight = [p for p in self.model.parameters() if p.requires_grad][-1]
            if kind in ("gradient", "infinite"):
                weight.register_hook(self.broken_gradient)
            elif kind == "loss":
                embeddings.register_forward_hook(self.broken_embeddings)

        def strikes(self) -> bool:
            return (mine or kind == "rate") and self.is_in_train and self.state.global_step + 1 in at

        def broken_gradient(self, gradient):
            if self.strikes():
                gradient = gradient.clone()
                gradient.view(-1)[0] = math.nan if kind == "gradient" else math.inf
            return gradient

        def broken_embeddings(self, module, inputs, output):
            return output * math.nan if self.model.training and self.strikes() else output

        def training_step(self, *args, **kwargs):
            if kind == "rate" and self.strikes():
                for group in self.optimizer.param_groups:
                    group["lr"] = 1e38
            return super().training_step(*args, **kwargs)

    Poisoned.__name__ = trainer.__name__
    return Poisoned


def main() -> None:
    steps, kind, script, *words = sys.argv[1:]
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    name = TRAINERS[script]
    setattr(module, name, poisoned(getattr(module, name), {int(step) for step in steps.split(",")}, kind))
    sys.argv = [f"{script}.py", *words]
    module.main()


if __name__ == "__main__":
    main()
