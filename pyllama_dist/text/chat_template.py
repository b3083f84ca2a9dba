"""The checkpoint's chat template: messages to the text that the model was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyllama_dist.errors import UsageError
from pyllama_dist.files import read_text
from pyllama_dist.text.messages import for_templates
from pyllama_dist.text.named_tokens import NAMES
from pyllama_dist.text.special import Breaker, Rendered
from pyllama_dist.text.thinking import CLOSE, OPEN
from pyllama_dist.text.tokenizer import Tokenizer
from pyllama_dist.text.tools.detect import calls_are_messages, format_of, grammar_format_of

if TYPE_CHECKING:
    from pyllama_dist.text.sandbox import SandboxedTemplate

TEMPLATE_LIMIT = 1 << 20  # bytes
OWN_TEXT = ("content", "reasoning_content")  # fields that an assistant's message wrote itself


class ChatTemplate:
    """`chat_template.jinja`, compiled, with the special strings it alone may write.

    Attributes:
        reads: names of the variables that the template reads.
        tool_format: how the model writes tool calls; None if the template does not tell.
        grammar_format: what grammars call that format; None if they do not know it.
    """

    def __init__(self, template: "SandboxedTemplate", tokenizer: Tokenizer) -> None:
        """`template` writes prompts for `tokenizer`."""
        self.reads = template.reads
        self.tool_format = format_of(template.source)
        self.grammar_format = grammar_format_of(template.source)
        self._calls_as_messages = calls_are_messages(template.source)
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

        Messages are those of OpenAI's API, see `messages`.

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
                "messages": [
                    self._broken(message)
                    for message in for_templates(
                        messages, calls_as_messages=self._calls_as_messages
                    )
                ],
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
            case "assistant" if "metadata" not in message:  # with it, a tool call
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
