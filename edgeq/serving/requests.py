"""Request bodies of chats and completions: their fields, and the jobs that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeq.core.errors import UsageError, unknown
from edgeq.runtime.sampling import SamplingParams
from edgeq.serving.failures import ApiError, of_request, wrong
from edgeq.serving.fields import Field, read, shown
from edgeq.serving.forms import FORMS, answer_grammar, tool_choice
from edgeq.serving.harmony import HarmonySplitter, go_on
from edgeq.serving.messages import ROLES, checked_messages
from edgeq.serving.parts import AnswerSplitter, Plain, Splitter
from edgeq.serving.served import ServedModel
from edgeq.serving.settings import ServerSettings
from edgeq.serving.worker import AnswerJob, check_prompt, encoded

MAX_STOPS = 16
MAX_PROMPTS = 64
"""Most prompts of one request for completions."""
RESERVED = frozenset(
    ("add_generation_prompt", "bos_token", "documents", "eos_token", "files", "messages",
     "pad_token", "tools", "unk_token")
)  # fmt: skip
"""Variables of chat templates that a request may not set with `chat_template_kwargs`."""

_ANY_TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}

MODEL = Field("model", ("string",), "A name that /v1/models lists; the first one if left out.")
STREAM = (
    Field("stream", ("boolean",), "Send the answer as server-sent events while it is generated."),
    Field("stream_options", ("object",), "With `stream`: {\"include_usage\": true} adds an event "
          "with the numbers of tokens.",
          schema={"properties": {"include_usage": {"type": "boolean"}}}),
)  # fmt: skip
SAMPLING = (
    Field("temperature", ("number",), "0 takes the most likely token.", 0, 2),
    Field("top_p", ("number",), "Keep the most likely tokens whose probabilities reach this sum; "
          "1 is off.", 0, 1),
    Field("top_k", ("integer",), "Keep this many of the most likely tokens; 0 is off.", 0, 1 << 31),
    Field("min_p", ("number",), "Keep tokens at least this fraction as likely as the most likely; "
          "0 is off.", 0, 1),
    Field("repetition_penalty", ("number",), "Divides logits of recent tokens; 1 is off.",
          0.01, 100),
    Field("presence_penalty", ("number",), "Subtracted from logits of tokens that were generated "
          "before.", -2, 2),
    Field("frequency_penalty", ("number",), "Subtracted for each time a token was generated "
          "before.", -2, 2),
    Field("logit_bias", ("object",), "Token id -> what is added to its logit, -100 to 100.",
          schema={"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
    Field("seed", ("integer",), "Seed of the random numbers: the same seed gives the same answer.",
          -(1 << 63), (1 << 63) - 1),
    Field("stop", ("string", "array"), f"Up to {MAX_STOPS} texts that end the answer and are not "
          "part of it.", schema={"items": {"type": "string"}, "maxItems": MAX_STOPS}),
    Field("n", ("integer",), "Number of answers to a prompt: only 1.", only=(1,)),
)  # fmt: skip
CHAT = (
    Field("messages", ("array",), "The conversation: messages with a role and a content.",
          required=True, schema={"minItems": 1, "items": {
              "type": "object",
              "properties": {"role": {"enum": [*ROLES]}, "content": _ANY_TEXT},
              "required": ["role"],
          }}),
    MODEL,
    Field("max_tokens", ("integer",), "The most tokens to generate.", 1, 1 << 31),
    Field("max_completion_tokens", ("integer",), "Newer name of max_tokens.", 1, 1 << 31),
    *SAMPLING,
    *STREAM,
    Field("logprobs", ("boolean",), "Report the log-probability of each token."),
    Field("top_logprobs", ("integer",), "With `logprobs`: most likely tokens to report at each "
          "step.", 0, 20),
    *FORMS,
    Field("chat_template_kwargs", ("object",), "Variables for the model's chat template, such as "
          "{\"enable_thinking\": false}."),
)  # fmt: skip
COMPLETION = (
    Field("prompt", ("string", "array"), "A text, token ids, or a list of either.", required=True,
          schema={"items": {}}),
    MODEL,
    Field("max_tokens", ("integer",), "The most tokens to generate; 16 if left out.", 0, 1 << 31),
    *SAMPLING,
    *STREAM,
    Field("logprobs", ("integer",), "Most likely tokens to report at each step.", 0, 20),
    Field("echo", ("boolean",), "Begin the answer with the prompt, and report its tokens too."),
    Field("best_of", ("integer",), "Number of answers to choose from: only 1.", only=(1,)),
    Field("suffix", ("string",), "Text after the answer: only an empty text.", only=("",)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request.

    Args:
        served: the model that the request names.
        jobs: the answers to generate, one after another.
        prompts: text that each answer begins with.
        stream: whether the answer is sent as server-sent events.
        include_usage: whether the events end with the token counts.
        asked: the request body, for responses that repeat its fields.
        splitter: makes the object that splits an answer into content, reasoning and tool calls.
    """

    served: ServedModel
    jobs: tuple[AnswerJob, ...]
    prompts: tuple[str, ...] = ("",)
    stream: bool = False
    include_usage: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)
    splitter: Callable[[], AnswerSplitter] = Plain


def chosen_model(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    """The model that a request names; the first model if it names none.

    Args:
        models: the models of the server, by name.
        name: name in the request; None if it is left out.

    Raises:
        ApiError: no model has this name.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise ApiError(404, "model_not_found", unknown("model", name[:100], models), "model")
    return models[name]


def read_for_model(
    body: Mapping[str, Any], fields: tuple[Field, ...], models: Mapping[str, ServedModel]
) -> tuple[dict[str, Any], ServedModel]:
    """Check the fields of a body and find the model that it names.

    Raises:
        ApiError: a field is invalid, or no model has this name.
    """
    values = read(body, fields)
    return values, chosen_model(models, values["model"])


def chat_call(
    body: Mapping[str, Any], models: Mapping[str, ServedModel], settings: ServerSettings
) -> Call:
    """Check a request body of ``/v1/chat/completions``.

    Args:
        body: the JSON object of the request.
        models: the models of the server, by name.
        settings: settings of the server, with the defaults of sampling.

    Raises:
        ApiError: a field is invalid or asks for something that the server does not offer.
    """
    values, served = read_for_model(body, CHAT, models)
    messages = checked_messages(values["messages"])
    extra = checked_variables(values["chat_template_kwargs"])
    tools, forced = tool_choice(values["tools"], values["tool_choice"])
    grammar = answer_grammar(values, served, tools, forced)
    ids = encoded(lambda: served.encode_chat(messages, tools, extra), "messages")
    begun = served.begun_answer(ids)
    if served.harmony and grammar is not None:
        # the grammars of calls hold the beginnings of messages
        more, begun = go_on(begun, forced or (bool(tools) and values["grammar"] is None))
        ids += served.tokenizer.encode(more, add_bos=False)
    check_prompt(ids, served.context, "messages")
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise wrong("top_logprobs", "top_logprobs needs logprobs to be true")
    most = values["max_completion_tokens"]
    syntax = served.syntax.knowing(tools) if tools else None
    single = syntax is not None and values["parallel_tool_calls"] is False
    stops = checked_stops(values["stop"])
    if single and syntax and syntax.end:  # the first call ends the answer
        stops = (*stops, syntax.end)
    job = AnswerJob(
        prompt=tuple(ids),
        params=sampling_params(values, served, settings.params),
        max_tokens=values["max_tokens"] if most is None else most,
        stop=stops,
        end_ids=served.end_ids,
        logprobs=(values["top_logprobs"] or 0) if values["logprobs"] else None,
        lookup=settings.lookup,
        constraint=grammar.start if grammar else None,
        shown=served.shown,
    )
    thinks = served.thinks and grammar is None
    inside = thinks and served.ends_in_thought(ids)

    def splitter() -> AnswerSplitter:
        if served.harmony:
            return HarmonySplitter(begun, bool(tools), single)
        return Splitter(thinks, inside, syntax, single) if thinks or syntax else Plain()

    return Call(
        served=served,
        jobs=(job,),
        splitter=splitter,
        **stream_options(values),
    )


def completion_call(
    body: Mapping[str, Any], models: Mapping[str, ServedModel], settings: ServerSettings
) -> Call:
    """Check a request body of ``/v1/completions``; see `chat_call`.

    Raises:
        ApiError: a field is invalid or asks for something that the server does not offer.
    """
    values, served = read_for_model(body, COMPLETION, models)
    prompts = _prompts(values["prompt"], served)
    for ids in prompts:
        check_prompt(ids, served.context, "prompt")
    most = 16 if values["max_tokens"] is None else values["max_tokens"]
    if not most and not values["echo"]:
        raise wrong("max_tokens", "max_tokens is 0, which needs echo; use 1 or more")
    job = AnswerJob(
        prompt=(),
        params=sampling_params(values, served, settings.params),
        max_tokens=most,
        stop=checked_stops(values["stop"]),
        logprobs=values["logprobs"],
        score_prompt=bool(values["echo"]) and values["logprobs"] is not None,
        lookup=settings.lookup,
    )
    texts = [served.tokenizer.decode(ids) if values["echo"] else "" for ids in prompts]
    return Call(
        served=served,
        jobs=tuple(replace(job, prompt=tuple(ids)) for ids in prompts),
        prompts=tuple(texts),
        **stream_options(values),
    )


def stream_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Call` about streaming.

    Raises:
        ApiError: an option is unknown, or options are given without `stream`.
    """
    stream, options = bool(values["stream"]), values["stream_options"]
    if options is not None and not stream:
        raise wrong("stream_options", "stream_options needs stream to be true")
    fields = (
        Field("include_usage", ("boolean",), ""),
        Field("include_obfuscation", ("boolean",), "", only=(False,)),
    )
    usage = bool(read(options, fields)["include_usage"]) if options else False
    return {"stream": stream, "include_usage": usage}


def sampling_params(
    values: Mapping[str, Any], served: ServedModel, defaults: SamplingParams
) -> SamplingParams:
    """Parameters of sampling: those of the request, and the server's defaults for the others.

    Raises:
        ApiError: a value is out of range.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "seed")  # fmt: skip
    given = {name: values[name] for name in names if values[name] is not None}
    if "seed" in given:
        given["seed"] %= 1 << 64
    if given.get("top_p") == 0:  # OpenAI allows 0: it means the most likely token
        given["top_k"], given["top_p"] = 1, 1.0
    if values["logit_bias"]:
        given["logit_bias"] = _biases(values["logit_bias"], served.model.config.vocab)
    try:
        return replace(defaults, **given)
    except UsageError as err:
        raise of_request(err, None) from err


def _biases(given: Mapping[str, Any], vocab: int) -> dict[int, float]:
    found = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab):
            raise wrong(
                "logit_bias",
                f"logit_bias names the token {shown(token)}; use ids of 0 to {vocab - 1}",
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("logit_bias", f"a logit_bias is {shown(bias)}; use -100 to 100")
        found[int(token)] = float(bias)
    return found


def checked_stops(stop: str | list[Any] | None) -> tuple[str, ...]:
    """Check the field ``stop``: the texts that end an answer.

    Raises:
        ApiError: an entry is not a text or is empty, or there are too many.
    """
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise wrong("stop", f"there are {len(stops)} stop texts; use up to {MAX_STOPS}")
    for one in stops:
        if not isinstance(one, str) or not one:
            raise wrong("stop", f"a stop text is {shown(one)}; use texts that are not empty")
    return tuple(stops)


def checked_variables(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the field ``chat_template_kwargs``: variables for the chat template.

    Raises:
        ApiError: the server itself sets a variable of that name, or the name is invalid.
    """
    for name in extra or {}:
        if name in RESERVED or not name.isidentifier():
            raise wrong(
                "chat_template_kwargs",
                f"chat_template_kwargs has {name[:60]!r}, which a request may not set; leave it "
                "out",
            )
    return dict(extra or {})


def _prompts(prompt: str | list[Any], served: ServedModel) -> list[list[int]]:
    """Token ids of each prompt of a request for completions."""
    if isinstance(prompt, str):
        return [_ids(prompt, served)]
    if prompt and all(isinstance(one, int) for one in prompt):
        return [_ids(prompt, served)]
    if not 1 <= len(prompt) <= MAX_PROMPTS:
        raise wrong("prompt", f"there are {len(prompt)} prompts; use 1 to {MAX_PROMPTS}")
    return [_ids(one, served) for one in prompt]


def _ids(prompt: Any, served: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        return encoded(lambda: served.tokenizer.encode(prompt, add_eos=False), "prompt")
    vocab = served.model.config.vocab
    if isinstance(prompt, list) and prompt:
        for token in prompt:
            if type(token) is not int or not 0 <= token < vocab:
                raise wrong(
                    "prompt", f"the prompt holds {shown(token)}; use token ids of 0 to {vocab - 1}"
                )
        return list(prompt)
    raise wrong("prompt", f"a prompt is {shown(prompt)}; use a text or token ids")
