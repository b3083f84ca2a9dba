"""The checkpoint's chat template: messages to the text that the model was trained on."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyllama_dist.errors import UsageError
from pyllama_dist.files import read_text
from pyllama_dist.text.special import Breaker, Rendered
from pyllama_dist.text.tokenizer import AddedToken, Tokenizer

if TYPE_CHECKING:
    from pyllama_dist.text.sandbox import SandboxedTemplate

TEMPLATE_LIMIT = 1 << 20  # bytes
OWN_TEXT = ("content", "reasoning_content")  # fields that an assistant's message wrote itself


class ChatTemplate:
    """`chat_template.jinja`, compiled, with the special strings it alone may write."""

    def __init__(self, template: "SandboxedTemplate", added: Iterable[AddedToken]) -> None:
        added = tuple(added)
        self._template = template
        self._break_all = Breaker(token.text for token in added)
        self._break_roles = Breaker(token.text for token in added if token.special)

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
        return cls(SandboxedTemplate(source, str(path)), tokenizer.added.values())

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> Rendered:
        """The conversation as the model reads it.

        Special strings in `messages` and `tools` are text (see `special`): all of them in what
        users, systems and tools wrote. What an assistant wrote keeps `<think>...</think>`, which
        templates cut out of the history, but cannot speak as another role. `variables`
        (`enable_thinking`, `bos_token`, ...) are the caller's own and are passed as they are.

        Raises:
            UsageError: the template does not take this conversation.
            FileError: the template does what no template may, or goes beyond a limit.
        """
        return Rendered(
            self._template.render(
                {
                    **variables,
                    "messages": [self._broken(message) for message in messages],
                    "tools": self._break_all.value(tools),
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        )

    def _broken(self, message: Mapping[str, object]) -> dict[str, object]:
        own = OWN_TEXT if message.get("role") == "assistant" else ()
        broken = {}
        for key, value in message.items():
            breaker = self._break_roles if key in own else self._break_all
            broken[self._break_all.text(key)] = breaker.value(value)
        return broken
