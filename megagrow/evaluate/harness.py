"""A megagrow model as lm-evaluation-harness' `lm_eval` wants it: log-likelihoods and generated text.

Requests become tokens as in its `HFLM`: the tokenizer is that of transformers, special tokens are added where its files
ask for them, contexts are cut on the left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from megagrow.config import require
from megagrow.errors import DataError
from megagrow.evaluate.service import Generation, Service
from megagrow.evaluate.windows import spans
from megagrow.generate import Sampling
from megagrow.metrics import Progress

MAX_NEW_TOKENS = 256  # where a task does not say how many, as lm_eval has it
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p")
BATCHES_AT_ONCE = 8  # of each tensor group between two reports

Answer = TypeVar("Answer")


class Instance(Protocol):
    """A request of lm_eval."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class HarnessModel:
    """The requests of lm_eval, answered by a service; `tasks.lm_eval_model` puts lm_eval's `TemplateLM` beneath it.

    Only the first rank's is asked, and lm_eval sees one process.

    Args:
        service: the model, and a tokenizer of transformers.
        progress: where to report.
        seed: of sampling; each request has its own, counted from here.
    """

    cache_hook: Any  # set by lm_eval

    def __init__(self, service: Service, progress: Progress | None = None, seed: int = 0) -> None:
        super().__init__()
        self.service, self.progress, self.seed = service, progress, seed
        self.tokenizer = service.tokenizer
        self.max_length = service.shared.model.config.max_seq_length
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer names no eos_token, which ends every text; add it to tokenizer_config.json")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first one of a text is predicted."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's caches of requests know the tokenizer by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special ones are added as the tokenizer's files say, unless the text begins with them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is what greedy decoding gives."""
        answers = self._scored("loglikelihood", [self._fitted(context, text) for _, context, text in requests])
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's full length; each token counts once."""
        texts = [str(request.args[0]) for request in requests]
        windows = [list(self._rolling(self.tok_encode(text))) for text in texts]
        answers = iter(self._scored("loglikelihood_rolling", [window for of_text in windows for window in of_text]))
        totals = [sum(next(answers)[0] for _ in of_text) for of_text in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that the model adds to each context, up to where a stop sequence begins."""
        settings = [self._generation(request.args[1]) for request in requests]
        prompts = [self._prompt(request.args[0], how) for request, how in zip(requests, settings, strict=True)]

        def answer(places: list[int]) -> list[str]:
            how = settings[places[0]]
            added = self.service.generate([prompts[i] for i in places], [self.seed + i for i in places], how)
            return [self._text(ids, how) for ids in added]

        order = sorted(range(len(requests)), key=lambda i: (repr(settings[i]), -len(prompts[i])))
        answers = self._in_blocks("generate_until", order, answer, lambda i: settings[i])
        texts = [text for _, text in sorted(zip(order, answers, strict=True))]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _scored(self, kind: str, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))

        def answer(places: list[int]) -> list[tuple[float, bool]]:
            return self.service.score([sequences[i] for i in places])

        answers = self._in_blocks(kind, order, answer)
        return [answer for _, answer in sorted(zip(order, answers, strict=True))]

    def _in_blocks(
        self,
        kind: str,
        places: list[int],
        answer: Callable[[list[int]], list[Answer]],
        group: Callable[[int], object] = lambda place: None,
    ) -> list[Answer]:
        """The answers at all places, asked for in blocks of one group each."""
        shared, answers = self.service.shared, list[Answer]()
        size = BATCHES_AT_ONCE * shared.batch_size * shared.num_groups
        while len(answers) < len(places):
            block = places[len(answers) :][:size]
            block = [place for place in block if group(place) == group(block[0])]
            answers += answer(block)
            if self.progress is not None:
                self.progress.update(len(answers), phase=kind, loss=None, total_steps=len(places))
        return answers

    def _fitted(self, context: list[int], text: list[int]) -> tuple[list[int], int]:
        """Both in one sequence that the model can see, cut on the left."""
        if len(text) > self.max_length:
            raise DataError(
                f"a continuation of {len(text)} tokens exceeds the model's max_seq_length={self.max_length}; "
                "leave the task out, or evaluate a model with a longer context"
            )
        return (context + text)[-(self.max_length + 1) :], len(text)

    def _rolling(self, text: list[int]) -> Iterator[tuple[list[int], int]]:
        tokens = [self.prefix_token_id, *text]
        for start, stop, num_scored in spans(len(tokens), self.max_length, self.max_length):
            yield tokens[start:stop], num_scored

    def _generation(self, kwargs: Mapping[str, Any]) -> Generation:
        """A task's `generation_kwargs`."""
        unknown = kwargs.keys() - {*LENGTH_NAMES, *SAMPLING_NAMES, "until"}
        require(
            not unknown,
            f"generation_kwargs: {', '.join(sorted(unknown))} is not done here; the task may ask for until, "
            f"{', '.join((LENGTH_NAMES[0], *SAMPLING_NAMES))}",
        )
        lengths = [int(kwargs[name]) for name in LENGTH_NAMES if kwargs.get(name) is not None]
        until = kwargs.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        ends.append(self.tokenizer.decode(self.eot_token_id))
        stops = tuple(stop for stop in ends if stop)
        return Generation((lengths or [MAX_NEW_TOKENS])[0], self.eot_token_id, stops, _sampling(kwargs))

    def _prompt(self, context: str, how: Generation) -> list[int]:
        """The context's last tokens, as many as leave room for the new ones."""
        room = self.max_length - how.max_new_tokens
        require(
            room > 0,
            f"max_gen_toks={how.max_new_tokens} leaves no room for a context in the model's max_seq_length="
            f"{self.max_length}; set a smaller one in the task's generation_kwargs",
        )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _text(self, ids: list[int], how: Generation) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text[: how.where_it_stops(text)]


def _sampling(kwargs: Mapping[str, Any]) -> Sampling:
    """Greedy where a task says so, or says nothing."""
    temperature, wanted = kwargs.get("temperature"), kwargs.get("do_sample")
    if wanted is False or (wanted is None and not temperature):
        return Sampling()
    top_k, top_p = int(kwargs.get("top_k") or 0), float(kwargs.get("top_p") or 1.0)
    return Sampling(1.0 if temperature is None else float(temperature), top_k, top_p)
