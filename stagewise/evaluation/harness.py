"""The model for lm-eval, shared by several processes. Imported when a benchmark runs, since lm-eval is an extra.

Every process runs all of lm-eval, with all questions and all answers; only the forward passes are distributed.
lm-eval's own method distributes the questions themselves, and hangs if a process gets none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from stagewise.artifacts.processes import gather_by_index
from stagewise.inference.chat_model import ChatModel


class SharedModel(HFLM):
    """The chat model behind lm-eval's interface, in batches of `batch_size` rows per process."""

    def __init__(self, speaker: ChatModel, batch_size: int):
        super().__init__(speaker.model, tokenizer=speaker.tokenizer, batch_size=batch_size, max_length=speaker.context)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._shared(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._shared(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._shared(super().generate_until, requests, disable_tqdm)

    @staticmethod
    def _shared(ask: Callable[..., list[Any]], requests: list[Instance], disable_tqdm: bool) -> list[Any]:
        """Requests with one context stay in one process: lm-eval runs it once for all of them."""
        state, contexts = PartialState(), {}
        numbers = [contexts.setdefault(request.args[0], len(contexts)) for request in requests]
        mine = [place for place, number in enumerate(numbers) if number % state.num_processes == state.process_index]

        def ask_mine() -> dict[int, Any]:
            answers = ask([requests[place] for place in mine], disable_tqdm) if mine else []
            return dict(zip(mine, answers, strict=True))

        found = gather_by_index(ask_mine)
        return [found[place] for place in range(len(requests))]
