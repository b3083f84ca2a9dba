"""A conversation: messages to tokens, tokens to an engine, tokens back to text."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sampler import Sampler, Sampling
from pyllama_dist.engine.sequence import Request
from pyllama_dist.engine.stream import Stream
from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import read_json
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.model_dir import ModelPaths
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.text.chat_template import ChatTemplate
from pyllama_dist.text.events import Event
from pyllama_dist.text.reply import Reply, ReplyParser
from pyllama_dist.text.special import Rendered
from pyllama_dist.text.tokenizer import Tokenizer

Message = dict[str, object]  # role and content


@dataclass(frozen=True)
class ModelParts:
    """A model's directory, opened."""

    name: str
    file: ModelFile
    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: Path  # generation_config.json, which need not be there
    defaults: Mapping[str, float]  # of `Sampling`, that the file asks for

    def sampling(self, temperature: float | None, topp: float | None, seed: int | None) -> Sampling:
        """The model's sampling, with what the user gave instead.

        Raises:
            UsageError: what the user gave cannot be.
            FileError: what the model asks for cannot be, and the user gave nothing instead.
        """
        usual = Sampling()

        def chosen(defaults: Mapping[str, float]) -> Sampling:
            default_temperature = defaults.get("temperature", usual.temperature)
            default_topp = defaults.get("topp", usual.topp)
            return Sampling(
                default_temperature if temperature is None else temperature,
                default_topp if topp is None else topp,
                seed,
            )

        chosen({})  # so that the user's mistakes are the user's
        try:
            return chosen(self.defaults)
        except UsageError as error:
            raise FileError(f"{self.generation}: {error}; mend or remove them there") from None


@contextmanager
def open_model(model: Path, tokenizer_path: Path | None = None) -> Iterator[ModelParts]:
    """Opens a directory made by `convert`, or a `.m` file and its tokenizer (see `ModelPaths`).

    Raises:
        UsageError: several files could be meant.
        FileError: a file is missing or damaged.
    """
    paths = ModelPaths.find(model, tokenizer_path)
    with ModelFile.open(paths.model, ARCHITECTURES) as file:
        tokenizer, template = paths.text()
        generation = paths.directory / "generation_config.json"
        defaults = _defaults(read_json(generation)) if generation.exists() else {}
        try:
            tokenizer = tokenizer.fitted(file.config.vocab_size)
        except FileError as error:
            raise FileError(f"{paths.tokenizer} for {paths.model}: {error}") from None
        yield ModelParts(paths.name, file, tokenizer, template, generation, defaults)


def _defaults(config: Mapping[str, object]) -> dict[str, float]:
    """Sampling as Hugging Face's generation_config.json says it."""
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    said = {"temperature": config.get("temperature"), "topp": config.get("top_p")}
    return {name: value for name, value in said.items() if isinstance(value, int | float)}


class Answer:
    """One answer as it comes: iterate for its events; afterwards look at the rest.

    Attributes:
        prompt: ids of what the model read.
        generation: the tokens as the engine gives them.
        tokens: ids so far.
        reply: the text so far, reasoning and answer apart.
    """

    def __init__(
        self,
        parts: ModelParts,
        prompt: list[int],
        rendered: Rendered | None,
        generation: Stream,
    ) -> None:
        """`rendered` is the conversation that became `prompt`; None without a template."""
        self.prompt, self.generation = prompt, generation
        self.tokens: list[int] = []
        self.reply = Reply()
        self._stream = parts.tokenizer.stream()
        self._parser = ReplyParser(rendered, parts.tokenizer.added)

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return self.reply.content

    def __iter__(self) -> Iterator[Event]:
        for token in self.generation:
            self.tokens.append(token)
            yield from self._gathered(self._parser.push(token, self._stream.push(token)))
        yield from self._gathered(self._parser.finish(self._stream.flush()))

    def _gathered(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            self.reply.add(event)
            yield event


class Conversation:
    """Messages so far, and the engine that answers them."""

    def __init__(
        self,
        parts: ModelParts,
        engine: Engine,
        sampling: Sampling,
        system: str | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> None:
        """`variables` are for the template (`enable_thinking`).

        Raises:
            UsageError: the model has no template for `system`, or it does not read a variable.
        """
        if system is not None and parts.template is None:
            raise UsageError(f"{parts.name} has no chat template, so it takes no system message")
        self._variables = dict(variables or {})
        for name in self._variables.keys() - (parts.template.reads if parts.template else ()):
            raise UsageError(
                f"{parts.name} has no chat template that reads {name}; "
                "leave out what sets it (--think, --no-think)"
            )
        self.parts, self.engine = parts, engine
        self._sampler = Sampler(sampling, parts.tokenizer.vocab_size)
        self._system: list[Message] = []
        if system is not None:
            self._system.append({"role": "system", "content": system})
        self.messages = list(self._system)

    def clear(self) -> None:
        """Forgets what was said."""
        self.messages = list(self._system)

    def ask(
        self,
        text: str,
        steps: int = 0,
    ) -> Answer:
        """Begins an answer; `remember` it when it has come, for the next question.

        Args:
            text: what the user says.
            steps: positions in all, prompt included; 0 for no limit but the context.

        Raises:
            UsageError: the conversation does not fit the context, or the template refuses it.
        """
        tokenizer = self.parts.tokenizer
        question: Message = {"role": "user", "content": text}
        if self.parts.template is None:
            rendered = None
            prompt = tokenizer.encode_raw(text)
        else:
            rendered = self.parts.template.render(
                [*self.messages, question], variables=self._variables
            )
            prompt = tokenizer.encode_template(rendered)
        if steps and steps <= len(prompt):
            raise UsageError(f"--steps {steps} leaves no room: the prompt has {len(prompt)} tokens")
        self._sampler.begin(prompt)
        generation = self.engine.submit(
            Request(
                prompt,
                self._sampler,
                stop=tokenizer.eos_ids,
                max_tokens=steps - len(prompt) if steps else None,
            )
        )
        self.messages.append(question)
        return Answer(self.parts, prompt, rendered, generation)

    def remember(self, answer: Answer) -> None:
        """Keeps an answer as part of the conversation."""
        message: Message = {"role": "assistant", "content": answer.text}
        if answer.reply.reasoning:  # a template keeps it or leaves it out
            message["reasoning_content"] = answer.reply.reasoning
        self.messages.append(message)
