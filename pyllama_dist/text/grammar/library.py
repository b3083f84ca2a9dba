"""llguidance, and our tokenizers as it takes them."""

import re
from typing import TYPE_CHECKING, Any

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import one_line
from pyllama_dist.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_TAG = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def library() -> Any:
    """The llguidance module.

    Raises:
        UsageError: it is not installed, or the empty package of that name is.
    """
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "structured output needs the llguidance library; install pyllama-dist[grammar]"
        ) from None
    if not hasattr(llguidance, "LLMatcher"):  # where no wheel fits, pip takes version 0.0.1
        raise UsageError(
            "the installed llguidance is an empty package: pip takes it where llguidance has no "
            "wheel for the system (it needs glibc 2.31 or newer on x86-64 or aarch64); use such a "
            "system, then install pyllama-dist[grammar] again"
        )
    return llguidance


class _Wrapper:
    """What llguidance asks of a tokenizer, by the names that it has for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_ids)
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        # These never are text: other added tokens, like runs of spaces, are.
        self.special_token_ids = [
            token.id
            for token in tokenizer.added.values()
            if token.special or _TAG.fullmatch(token.text)
        ]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError  # only asked for tokens to force, and no grammar forces any


def library_tokenizer(tokenizer: Tokenizer) -> "LLTokenizer":
    """llguidance's index of the tokens; for 150,000 tokens it takes a second and 100 MB.

    Raises:
        UsageError: llguidance is missing.
        FileError: no token ends an answer.
    """
    module = library()
    ends = sorted(token for token in tokenizer.eos_ids if token < tokenizer.vocab_size)
    if not ends:
        raise FileError(
            "the tokenizer names no token that ends an answer, which structured output needs; "
            "take generation_config.json from the original checkpoint"
        )
    try:
        made: LLTokenizer = module.LLTokenizer(
            _Wrapper(tokenizer), n_vocab=tokenizer.vocab_size, eos_token=ends
        )
    except Exception as error:  # a library in Rust: what it raises is not told
        raise FileError(
            f"llguidance cannot read the tokenizer: {one_line(error)}; "
            "update llguidance, or take the tokenizer of the original checkpoint"
        ) from None
    return made
