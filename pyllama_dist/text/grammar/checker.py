"""A program of its own: says of each grammar on its standard input whether llguidance takes it.

Some regular expressions take llguidance minutes or all memory, which nothing stops from within a
thread. Here the system ends the whole process. `CheckerProcess` starts it; frames in both
directions are a length, uint32 in little-endian order, and UTF-8 text.
"""

import resource
import signal
import sys
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

CPU_SECONDS = 0.5  # for one grammar; most take a millisecond
WALL_SECONDS = 10
MEMORY_LIMIT = 2 << 30  # bytes of address space
FIRST_STEPS = 4
MAX_LEXER_STATES = 50_000  # of up to 2 kB each
MAX_GRAMMAR_SIZE = 100_000


def main() -> None:
    """Answers each grammar with the library's complaint, which is empty if there is none.

    Argument: the size of the vocabulary.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    tokenizer = LLTokenizer(_Bytes(int(sys.argv[1])))  # type: ignore[arg-type]
    limits = LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE, verbose_errors=False
    )
    while (source := read_frame(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
        _walk(matcher)
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(sys.stdout.buffer, matcher.get_error())


def _walk(matcher: "LLMatcher") -> None:
    """Takes the first steps, as long as there is one way only: some grammars fail there."""
    for _ in range(FIRST_STEPS):
        if matcher.is_error():
            return
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if mask.bit_count() != 1:
            return
        matcher.consume_token(mask.bit_length() - 1)


def write_frame(file: IO[bytes], text: str) -> None:
    """Writes a frame, and flushes."""
    data = text.encode()
    file.write(len(data).to_bytes(4, "little") + data)
    file.flush()


def read_frame(file: IO[bytes]) -> str | None:
    """Reads a frame; None at the end of the file."""
    head = file.read(4)
    data = file.read(int.from_bytes(head, "little"))
    return data.decode("utf-8", "replace") if len(head) == 4 else None


class _Bytes:
    """A tokenizer of single bytes, then of tokens without text."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, size: int) -> None:
        count = max(256, size)
        self.tokens = [bytes([i]) for i in range(256)] + [b""] * (count + 1 - 256)
        self.eos_token_id = count

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


if __name__ == "__main__":
    main()
