"""The fields of a request that are served as they are meant. All others are refused.

transformers' server ignores what it does not know how to serve: `n`, penalties, images. An answer
that is not what was asked for is worse than none.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lora_mux

Nothing = Field(default=None, ge=0, le=0)  # a penalty of 0 is none
# What says what is the case anyhow is taken, and transformers does not see it.
Unseen = Field(default=None, exclude=True)
Empty = Field(default=None, exclude=True, max_length=0)
LARGEST_WEIGHT = 10.0  # larger ones overflow, fp16 first, and then there is no answer
Stop = Annotated[str, Field(min_length=1, max_length=256)]
SURROGATE = re.compile("[\ud800-\udfff]")  # a str has one only if its other half is missing
DEEPEST = 20  # levels of a body; what is served has five


class Asked(BaseModel):
    """What all endpoints take. A field that is null counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = "base"
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    seed: int | None = None
    # They change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None

    @property
    def row(self) -> dict[str, float]:
        """The adapters that the model's name asks for: {"sql": 1.0} of "base:sql", {} of "base"."""
        base, colon, text = self.model.partition(":")
        if base != "base":
            raise HTTPException(
                404,
                f"`model` must be 'base', or 'base:' and adapters such as 'base:sql+0.4*french', "
                f"got {self.model[:80]!r}; GET /v1/models lists the adapters",
            )
        row = lora_mux.parse_row(text) if colon else {}
        for name, weight in row.items():
            if abs(weight) > LARGEST_WEIGHT:
                raise HTTPException(
                    400,
                    f"`model` must have weights from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, "
                    f"got {weight!r} for {name[:80]!r}",
                )
        return row

    @property
    def longest(self) -> int | None:
        """How many tokens the answer may have; None = it was not said."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        """The texts at whose first the answer ends."""
        return []


class StreamOptions(BaseModel):
    """The last chunk of a stream says how many tokens there were, whether asked to or not."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = True
    include_obfuscation: Literal[False] = False


class AskedByOldFields(Asked):
    """What chat and completions share."""

    max_tokens: int | None = Field(default=None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: float | None = Nothing
    frequency_penalty: float | None = Nothing
    logit_bias: dict[str, Any] | None = Empty

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Text(BaseModel):
    """A part of a message; of an answer that comes back, with what it says beside its text."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Empty
    logprobs: list[Any] | None = Empty


class Message(BaseModel):
    """A message of plain text; an answer may come back as it was sent."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text]
    id: str | None = Unseen
    status: Literal["completed", "incomplete"] | None = Unseen
    annotations: list[Any] | None = Empty


class PlainText(BaseModel):
    """The form of an answer that is text."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class TextForm(BaseModel):
    """What responses have for it."""

    model_config = ConfigDict(extra="forbid")
    format: PlainText | None = None


class Chat(AskedByOldFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Empty
    tool_choice: Literal["none", "auto"] | None = None
    response_format: PlainText | None = Unseen
    modalities: list[Literal["text"]] | None = Unseen

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Completion(AskedByOldFields):
    """POST /v1/completions."""

    prompt: str
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = Unseen


class Response(Asked):
    """POST /v1/responses."""

    input: str | Annotated[list[Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextForm | None = Unseen
    tools: list[Any] | None = Empty
    include: list[Any] | None = Empty
    tool_choice: Literal["none", "auto"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None

    @property
    def longest(self) -> int | None:
        return self.max_output_tokens


AnyAsked = TypeVar("AnyAsked", bound=Asked)


def checked(kind: type[AnyAsked], body: dict[str, Any]) -> AnyAsked:
    """The request that a body is.

    Raises:
        HTTPException: 400, with the field, what was expected and what was got.
    """
    try:
        return kind.model_validate(_plain(body))
    except ValidationError as error:
        raise HTTPException(400, explain(error.errors())) from None


def explain(problems: Sequence[Mapping[str, Any]]) -> str:
    """One line about the innermost of pydantic's errors."""
    problem = max(problems, key=lambda found: len(found["loc"]))
    path = [str(part) for part in problem["loc"]]
    if path[:1] == ["body"]:  # FastAPI's
        path = path[1:]
    if not path or problem["type"] == "json_invalid":
        return "the body must be an object in JSON, with `Content-Type: application/json`"
    field = ".".join(path)
    is_more_than_nothing = problem.get("ctx", {}).get("max_length") == 0
    if problem["type"] == "extra_forbidden" or is_more_than_nothing:
        return f"`{field}` is not served here, and is not ignored either: leave it out"
    return f"`{field}`: {problem['msg']}, got {repr(problem['input'])[:80]}"


def _plain(value: Any, levels: int = DEEPEST) -> Any:
    """A body without nulls, which OpenAI's client, and whoever sends its answers back, writes.

    Raises:
        HTTPException: 400, it is nested too deep, or has half a character, as JSON can say it.
    """
    if not levels:
        raise HTTPException(400, f"the body must be nested at most {DEEPEST} levels deep")
    if isinstance(value, dict):
        return {key: _plain(item, levels - 1) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item, levels - 1) for item in value]
    if isinstance(value, str) and SURROGATE.search(value):
        raise HTTPException(400, f"texts must be Unicode, got half a character in {value[:80]!a}")
    return value
