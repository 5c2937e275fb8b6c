"""A model with the adapters of a folder, which answers many requests in one forward pass.

It knows nothing of Ray.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import lora_mux
from lora_mux.errors import LoraMuxError, PoolCapacityError, UnknownAdapterError

MOST_TOKENS = 1024  # of an answer: those who share its batch wait for its end
FIELDS = {"text": str, "adapters": str, "tokens": int}  # of a request


@dataclass(frozen=True)
class Question:
    """A request that can be answered: what it asks, and with which adapters."""

    ids: list[int]
    row: dict[str, float]
    tokens: int  # of the answer, at most
    gone: Event = field(default_factory=Event)  # set = nobody waits for the answer any more


# What there is of some answers after a step: a token, why there will be none, or StopIteration.
Pieces = Mapping[int, int | LoraMuxError | type[StopIteration]]


class Engine:
    """The model. Its adapters are FOLDER/NAME, and are loaded when a request first names them."""

    def __init__(self, model: str, adapters: str, memory: int | str | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(model).eval().to(device)
        self.mux = lora_mux.attach(self.model, memory=memory)
        self.folder = Path(adapters)
        config = self.model.config.get_text_config()
        self._positions = getattr(config, "max_position_embeddings", None)
        ends = self.model.generation_config.eos_token_id
        self._ends = {*ends} if isinstance(ends, list) else {ends}

    def question(self, request: Mapping[str, Any]) -> Question:
        """Check a request, before it meets others in a batch.

        Args:
            request: {"text": the prompt, "adapters": as in lora_mux.parse_row, "tokens": how many
                the answer may have}. Without adapters it is one for the base model.

        Raises:
            RoutingError: the adapters are malformed.
            ValueError: something else is.
        """
        given = {"adapters": "__base__", "tokens": 16, **request}
        for name, kind in FIELDS.items():
            if type(given.get(name)) is not kind:
                raise ValueError(f"`{name}` must be {kind.__name__}, got {given.get(name)!r:.80}")
        if unknown := given.keys() - FIELDS.keys():
            raise ValueError(f"a request has {', '.join(FIELDS)}, got {sorted(unknown)!r:.80}")
        row, tokens = lora_mux.parse_row(given["adapters"]), given["tokens"]
        if not 1 <= tokens <= MOST_TOKENS:
            raise ValueError(f"`tokens` must be 1 to {MOST_TOKENS}, got {tokens}")
        try:
            given["text"].encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"`text` must be Unicode, got half a character in {given['text']!a:.80}"
            ) from None
        ids = self.tokenizer(given["text"])["input_ids"]
        if not ids:
            raise ValueError("`text` must have a token, got none; ask something")
        if self._positions is not None and len(ids) + tokens > self._positions:
            raise ValueError(
                f"`text` and `tokens` must fit into the model's {self._positions} positions, got "
                f"{len(ids)} + {tokens}; ask for less"
            )
        return Question(ids, row, tokens)

    def pull(self, name: str) -> None:
        """Load FOLDER/NAME, while others are answered.

        Args:
            name: one that lora_mux.parse_row has read, so that it leads nowhere else.

        Raises:
            UnknownAdapterError: there is no such folder.
            LoraMuxError: it holds no adapter of this model. The next request tries again.
        """
        folder = self.folder / name
        if not os.path.isdir(folder):  # False as well for a name that is too long
            raise UnknownAdapterError(
                f"`adapters` must name folders that are served, got {name!r:.80}; save it there"
            )
        self.mux.load(name, folder)
        try:
            self.mux.prefetch([name])  # with memory=, values are read and checked here
        except PoolCapacityError:
            pass  # it would fit, were others not in use; its batch will bring it in
        except LoraMuxError:
            self.mux.remove(name)
            raise

    def answer(self, questions: Sequence[Question], put: Callable[[Pieces], None]) -> None:
        """Answer questions, and hand on what there is after each step, by their places.

        It is one batch, unless the adapters do not fit into the memory together, or one of them
        cannot be read. Then it is halved, so that a question is refused only if it cannot be
        answered alone. One thread at a time.
        """
        # Neighbours share adapters, so that halves have fewer of them.
        order = sorted(range(len(questions)), key=lambda i: sorted(questions[i].row))
        self._answer({i: questions[i] for i in order}, put)

    def _answer(self, asked: Mapping[int, Question], put: Callable[[Pieces], None]) -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(self.mux.route([q.row for q in asked.values()]))
            except LoraMuxError as error:
                refused = error
            else:
                self._generate(asked, put)
                return
        if len(asked) == 1:
            put({i: refused for i in asked})
            return
        places, half = [*asked], len(asked) // 2
        for part in (places[:half], places[half:]):
            self._answer({i: asked[i] for i in part}, put)

    @torch.no_grad()
    def _generate(self, asked: Mapping[int, Question], put: Callable[[Pieces], None]) -> None:
        """One batch, greedily, with the rows that are in force."""
        questions = [*asked.values()]
        inputs = self.tokenizer.pad({"input_ids": [q.ids for q in questions]}, return_tensors="pt")
        left = {i: q.tokens for i, q in asked.items()}

        def step(tokens: list[int]) -> None:
            running = {i: t for i, t in zip(asked, tokens, strict=True) if i in left}
            put({i: token for i, token in running.items() if token not in self._ends})
            for i, token in running.items():
                left[i] -= 1
                if token in self._ends or not left[i]:
                    del left[i]
            if ended := running.keys() - left.keys():
                put(dict.fromkeys(ended, StopIteration))

        self.model.generate(
            **inputs.to(self.model.device),
            max_new_tokens=max(q.tokens for q in questions),
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=Steps(step),
            stopping_criteria=StoppingCriteriaList(
                [Enough(inputs["input_ids"].shape[1], questions)]
            ),
        )


class Steps(BaseStreamer):
    """A streamer, as generate() calls it, for a batch: the prompt comes first, then each step."""

    def __init__(self, step: Callable[[list[int]], None]) -> None:
        self._step, self._prompt = step, True

    def put(self, value: Tensor) -> None:
        """Hand the tokens of a step on."""
        if not self._prompt:
            self._step(value.tolist())
        self._prompt = False

    def end(self) -> None:
        """Nothing: each row has ended by itself."""


class Enough(StoppingCriteria):
    """A row ends when it has its tokens or nobody waits for it, and the batch with the last row."""

    def __init__(self, prompt: int, questions: Sequence[Question]) -> None:
        self._prompt, self._questions = prompt, questions

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows are done."""
        tokens = input_ids.shape[1] - self._prompt
        done = [tokens >= q.tokens or q.gone.is_set() for q in self._questions]
        return torch.tensor(done, device=input_ids.device)
