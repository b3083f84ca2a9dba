"""Makes the grammars of one model."""

from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

from pyllama_dist.closing import Closing
from pyllama_dist.errors import UsageError
from pyllama_dist.text.grammar.calls import CALL, calls_source, tools_of
from pyllama_dist.text.grammar.checker_process import CheckerProcess
from pyllama_dist.text.grammar.library import library, library_tokenizer
from pyllama_dist.text.grammar.matcher import Grammar, grammar_error
from pyllama_dist.text.grammar.schema import Json, checked_schema, inline
from pyllama_dist.text.special import well_formed
from pyllama_dist.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

SOURCE_LIMIT = 256 << 10  # bytes of a whole grammar
_KNOWN = 256  # grammars that need not be checked again
# The library forces tokens where only one text is possible, as it thinks that our tokenizer would
# cut that text. The model knows better, and no text has to be cut in the middle of a generation.
_HEAD = '%llguidance {"no_forcing": true}\n'


class Grammars(Closing):
    """Makes the grammars of one model; from any thread. They outlive it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Grammars for the answers of the model of `tokenizer`; costs nothing before the first."""
        self._tokenizer = tokenizer
        self._known: dict[str, None] = {}
        self._lock = Lock()
        self._checker = CheckerProcess(tokenizer.vocab_size)

    def json_schema(self, schema: object | None) -> Grammar:
        """JSON that satisfies a schema, after at most two line breaks.

        Args:
            schema: parsed from JSON. None or `{}`: any JSON object.

        Raises:
            UsageError: it is no schema, too large, or says what no grammar can do; or llguidance
                is missing.
        """
        checked: Json = {} if schema is None else checked_schema(schema, "the schema")
        value = inline(checked or {"type": "object"})
        # A grammar that allows a line break and then nothing would pass: only the value is checked.
        return self._grammar(f'start: ("\\n" | "\\n\\n")? {value}', f"start: {value}")

    def tool_calls(
        self,
        tools: Sequence[object],
        format_name: str,
        *,
        required: bool,
        parallel: bool = True,
    ) -> Grammar:
        """Answers that call tools with arguments that satisfy their schemas.

        Without tools: an answer that calls none. Arguments come in the order of the schema. In
        formats with tags, strings are not held to more than `enum` and `const`. For a tool that is
        not `strict`, what no grammar can do is left out.

        Args:
            tools: in OpenAI's shape.
            format_name: how the model writes calls, see `calls`.
            required: whether the answer must be a call; else it may be text, calls, or both.
            parallel: whether several calls are allowed.

        Raises:
            UsageError: as for `json_schema`; or there is no tool to call, or the tokenizer lacks
                tokens that the format needs.
        """
        chosen = tools_of(tools)
        if required and not chosen:
            raise UsageError("a tool call is required, but there are no tools; give some")
        source = calls_source(
            chosen, format_name, required=required, parallel=parallel, tag=self._tag
        )
        return self.lark(source)

    def lark(self, source: str) -> Grammar:
        """A grammar in the dialect of Lark that llguidance reads, with a rule `start`.

        Raises:
            UsageError: it is none, or too complex; or llguidance is missing.
        """
        return self._grammar(source, source)

    def _grammar(self, source: str, checked: str) -> Grammar:
        """The grammar of `source`, which is no more complex than `checked`."""
        source, checked = _HEAD + well_formed(source), _HEAD + well_formed(checked)
        bytes_ = len(source.encode())
        if bytes_ > SOURCE_LIMIT:
            raise UsageError(
                f"the grammar has {bytes_:,} bytes, at most {SOURCE_LIMIT:,} are taken; "
                "make schemas smaller or give fewer tools"
            )
        library()
        with self._lock:
            tokenizer = self._library_tokenizer
            known = source in self._known
        if not known and (said := self._checker.check(checked)):
            raise grammar_error(said)
        size = self._tokenizer.vocab_size
        grammar = Grammar(source, self._token(CALL), size, tokenizer)
        if not known:
            grammar.start().mask()  # what only the tokens at hand can tell
            with self._lock:
                self._known[source] = None
                while len(self._known) > _KNOWN:
                    del self._known[next(iter(self._known))]
        return grammar

    def close(self, error: BaseException | None = None) -> None:
        """Ends the process that checks grammars; another grammar would start it again."""
        self._checker.close()

    @cached_property
    def _library_tokenizer(self) -> "LLTokenizer":
        return library_tokenizer(self._tokenizer)

    def _token(self, text: str) -> int | None:
        added = self._tokenizer.added.get(text)
        return None if added is None or added.id >= self._tokenizer.vocab_size else added.id

    def _tag(self, text: str) -> str | None:
        token = self._token(text)
        return None if token is None else f"<[{token}]>"
