"""What clients send, by the names of OpenAI's API. What would not be honoured is refused, never ignored in silence.

Fields that OpenAI has and this server has not are listed with the one value that asks for nothing, so that clients
which always send them work; `user` and the like change no answer and are read past.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 16
MOST_STOPS = 4
MOST_RIVALS = 20

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Token = Annotated[int, Field(ge=0, le=10_000_000)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None
Nothing = Annotated[float, Field(ge=0, le=0)] | None


class Body(BaseModel):
    """A JSON object with no other fields than these, and numbers that are numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, body: Any) -> Any:
        """Without fields that are null: some clients send all that they know, and null asks for nothing."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class StreamOptions(Body):
    """Whether a stream ends with a count of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """The only format of an answer: text."""

    type: Literal["text"]


def _without(thinks: bool | None) -> bool | None:
    if thinks:
        raise PydanticCustomError("thoughts", "models answer without thoughts here, as they were trained and judged")
    return thinks


class TemplateOptions(Body):
    """What vLLM's clients say to a template that can think."""

    enable_thinking: Annotated[bool | None, AfterValidator(_without)] = None


class _Asking(Body):
    """What chat and plain completions share."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    stop: Stops = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class ChatBody(_Asking):
    """POST /v1/chat/completions. Messages and tools are read as training rows are."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_RIVALS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: TemplateOptions | None = None


class CompletionBody(_Asking):
    """POST /v1/completions. A prompt is text or tokens; a list of them is answered in order."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = None


class LoadBody(Body):
    """POST /v1/load_lora_adapter, as vLLM names it: a finished run of the same base, and what to call it."""

    lora_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Name
