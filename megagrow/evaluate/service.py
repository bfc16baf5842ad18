"""The first rank asks, all ranks work: what a program that knows nothing of ranks can drive."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from megagrow.evaluate.shared_model import SharedModel
from megagrow.evaluate.windows import Window
from megagrow.generate import Sampling
from megagrow.parallel.collectives import broadcast_json

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Generation:
    """How prompts are continued.

    Attributes:
        max_new_tokens: tokens to add at most.
        end: the token that ends a text.
        stops: texts that end it too.
        sampling: how tokens are picked.
    """

    max_new_tokens: int
    end: int
    stops: Sequence[str] = ()
    sampling: Sampling = Sampling()

    def where_it_stops(self, text: str) -> int | None:
        """Where the first of `stops` begins; None: none is there."""
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        return min(found, default=None)


class Service:
    """A shared model that the first rank uses as if it were alone, while the others serve.

    Within `with service:` the first rank calls `score` and `generate`, and all others call `serve`, which returns when
    the first one leaves. Requests travel as JSON.

    Args:
        shared: the model.
        tokenizer: of transformers, the same on every rank: each sees for itself where a text stops.
    """

    def __init__(self, shared: SharedModel, tokenizer: Any) -> None:
        self.shared, self.tokenizer = shared, tokenizer
        self._others_wait = True  # for what is asked next; while they work, telling them anything would hang

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_first and self._others_wait:
            self._tell(None)

    @property
    def is_first(self) -> bool:
        """Whether this rank asks."""
        return self.shared.mesh.is_main

    def score(self, sequences: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of the last tokens of each sequence, and whether each of them is the most likely one.

        Args:
            sequences: tokens, and how many of the last ones are scored.
        """
        return self._ask({"score": list(sequences)}, self._score)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Generation) -> list[list[int]]:
        """Continues each prompt up to where `settings` ends it; what ended it is still there.

        Args:
            prompts: token ids.
            seeds: of the sampling, one for each.
            settings: see `Generation`.
        """
        job = {"generate": list(prompts), "seeds": list(seeds), "how": asdict(settings)}
        return self._ask(job, self._generate)

    def serve(self) -> None:
        """Takes part in what the first rank asks for, until it leaves."""
        while (job := self._tell(None)) is not None:
            if "score" in job:
                self._score(job)
            else:
                self._generate(job)

    def _ask(self, job: dict[str, Any], work: Callable[[dict[str, Any]], list[Answer]]) -> list[Answer]:
        self._others_wait = False
        answers = work(self._tell(job))
        self._others_wait = True
        return answers

    def _tell(self, job: Any) -> Any:
        return broadcast_json(job, self.shared.mesh.world, self.shared.mesh.device)

    def _score(self, job: dict[str, Any]) -> list[tuple[float, bool]]:
        windows = [Window(np.array(tokens, np.int64), num_scored) for tokens, num_scored in job["score"]]
        nll_N, greedy_N = self.shared.score(windows)
        return list(zip((-nll_N).tolist(), greedy_N.tolist(), strict=True))

    def _generate(self, job: dict[str, Any]) -> list[list[int]]:
        how = Generation(**job["how"] | {"sampling": Sampling(**job["how"]["sampling"])})

        def is_done(added: list[int]) -> bool:
            return added[-1] == how.end or how.where_it_stops(self.tokenizer.decode(added)) is not None

        prompts, seeds = job["generate"], job["seeds"]
        return self.shared.generate(prompts, how.max_new_tokens, seeds, how.sampling, is_done)
