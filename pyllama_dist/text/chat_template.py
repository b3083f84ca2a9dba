"""The checkpoint's chat template: messages to the text that the model was trained on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllama_dist.errors import UsageError
from pyllama_dist.files import read_text
from pyllama_dist.text.named_tokens import NAMES
from pyllama_dist.text.special import Breaker, Rendered
from pyllama_dist.text.thinking import CLOSE, OPEN
from pyllama_dist.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyllama_dist.text.sandbox import SandboxedTemplate

TEMPLATE_LIMIT = 1 << 20  # bytes
OWN_TEXT = ("content", "reasoning_content")  # fields that an assistant's message wrote itself


class ChatTemplate:
    """`chat_template.jinja`, compiled, with the special strings it alone may write.

    Attributes:
        reads: names of the variables that the template reads.
    """

    def __init__(self, template: "SandboxedTemplate", tokenizer: Tokenizer) -> None:
        """`template` writes prompts for `tokenizer`."""
        self.reads = template.reads
        self._template = template
        # A name without a token is an empty text: Llama 3's templates add `bos_token` to others.
        self._named = {**dict.fromkeys(NAMES, ""), **tokenizer.named}
        thinking = {OPEN, CLOSE}
        added = tokenizer.added.values()
        texts = {token.text for token in added} | thinking
        self._break_all = Breaker(texts)
        self._break_but_switches = Breaker({text for text in texts if not _is_switch(text)})
        self._break_roles = Breaker({token.text for token in added if token.special} - thinking)

    @classmethod
    def open(cls, model_dir: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """Reads the template of a model; None if it has none.

        Raises:
            UsageError: jinja2 is not installed.
            FileError: the file is unreadable or no Jinja template.
        """
        path = model_dir / "chat_template.jinja"
        if not path.exists():
            return None
        source = read_text(path, TEMPLATE_LIMIT)
        try:
            from pyllama_dist.text.sandbox import SandboxedTemplate
        except ImportError:
            raise UsageError("chat needs the jinja2 library; install pyllama-dist[root]") from None
        return cls(SandboxedTemplate(source, str(path)), tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> Rendered:
        """The conversation as the model reads it.

        Messages are those of OpenAI's API: templates get a content of several texts as one, and
        the arguments of a tool call as an object.

        Special strings in what the caller gives are text (see `special`): all of them in what
        tools wrote. What an assistant wrote keeps `<think>...</think>`, which templates cut out of
        the history, but cannot speak as another role. Users and systems may switch thinking off
        with a word that is a token: the `/nothink` of GLM-4.5.

        Args:
            messages: the conversation, each message with its `role` and `content`.
            add_generation_prompt: end with the beginning of an answer.
            tools: functions that the model may call.
            variables: what else the template reads (`enable_thinking`).

        Raises:
            UsageError: the template does not take this conversation.
            FileError: the template does what no template may, or goes beyond a limit.
        """
        try:
            given = {
                **{key: self._break_all.value(value) for key, value in (variables or {}).items()},
                "messages": [self._broken(_as_templates_read(message)) for message in messages],
                "tools": self._break_all.value(tools),
            }
        except RecursionError:
            raise UsageError("the conversation is nested too deeply; flatten its objects") from None
        return Rendered(
            self._template.render(
                {**self._named, **given, "add_generation_prompt": add_generation_prompt}
            )
        )

    def _broken(self, message: Mapping[str, object]) -> dict[str, object]:
        breakers: dict[str, Breaker] = {}
        match message.get("role"):
            case "assistant":
                breakers = dict.fromkeys(OWN_TEXT, self._break_roles)
            case "user" | "system":
                breakers = {"content": self._break_but_switches}
        broken = {}
        for key, value in message.items():
            breaker = breakers.get(key, self._break_all)
            broken[self._break_all.text(key)] = breaker.value(value)
        return broken


def _is_switch(text: str) -> bool:
    """Whether an added token is a word that users type to choose how the model answers."""
    return text.startswith("/") and text[1:].isalpha()


def _as_templates_read(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message of OpenAI's API as templates expect it."""
    changed: dict[str, Any] = {}
    match message.get("content"):
        case None if "content" in message:  # beside tool calls; templates would write "None"
            changed["content"] = ""
        case [*parts] if all(isinstance(part, Mapping) for part in parts):
            texts = [part.get("text") for part in parts if part.get("type") == "text"]
            if len(texts) == len(parts):
                changed["content"] = "".join(map(str, texts))
    match message.get("tool_calls"):
        case [*calls]:
            changed["tool_calls"] = [_call(call) for call in calls]
    return {**message, **changed}


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, not the JSON text of one."""
    match call:
        case {"function": dict(function)}:
            return {**call, "function": _call(function)}
        case {"arguments": str(text)}:
            try:
                arguments = json.loads(text or "{}")
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                raise UsageError(
                    f"the arguments of the tool call {call.get('name')!r} are no JSON object; "
                    "send what the model wrote, or leave the call out"
                )
            return {**call, "arguments": arguments}
    return call
