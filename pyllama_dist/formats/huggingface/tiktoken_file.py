"""`tokenizer.json` from a tiktoken vocabulary: the `tokenizer.model` of the original GLM-4-9B.

Each line has a piece in base64 and its rank, which is its id. Merging takes the neighbours whose
joined bytes have the lowest rank.
"""

import base64
import binascii
from pathlib import Path

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import one_line

# Words, numbers of up to three digits, signs, line ends, spaces; as in GLM-4's tokenizer.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# They follow the ranks, in this order.
SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is one of tiktoken; SentencePiece's is binary."""
    parts = data.partition(b"\n")[0].split()
    return len(parts) == 2 and parts[1].isdigit()


def tokenizer_json(data: bytes, path: Path) -> bytes:
    """The same tokenizer as a `tokenizer.json`.

    Args:
        data: the file's content.
        path: of the file, for errors.

    Raises:
        FileError: the file is damaged.
        UsageError: the tokenizers library is not installed.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise UsageError(
            f"{path}: text needs the tokenizers library; install it with "
            f"`pip install pyllama-dist[root]`"
        ) from None
    ranks = _ranks(data, path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(char) for char in alphabet if ord(char) < 256}  # these bytes are named as they are
    others = iter(alphabet[len(own) :])
    name = [chr(byte) if byte in own else next(others) for byte in range(256)]
    names = {piece: "".join(name[byte] for byte in piece) for piece in ranks}
    merges = [
        (names[piece[:cut]], names[piece[cut:]])
        for piece in ranks
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    try:
        library = Tokenizer(
            models.BPE(
                vocab={names[piece]: rank for piece, rank in ranks.items()},
                merges=merges,
                ignore_merges=True,
            )
        )
    except Exception as error:  # the library raises bare Exception
        raise _damaged(path, one_line(error)) from None
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return library.to_str().encode()


def _ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Pieces with their ranks, in the order of ranks, which have no gap."""
    pieces: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            piece, rank = line.split()
            pieces[int(rank)] = base64.b64decode(piece, validate=True)
        except (ValueError, binascii.Error):
            raise _damaged(path, f"line {number} is no piece in base64 with a rank") from None
    if sorted(pieces) != list(range(len(pieces))):
        raise _damaged(path, f"its {len(pieces)} ranks have gaps")
    ranks = {pieces[rank]: rank for rank in range(len(pieces))}
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or b"" in ranks or len(ranks) < len(pieces):
        what = f"byte {lacking[0]:#04x} is no piece" if lacking else "pieces are empty or equal"
        raise _damaged(path, what)
    return ranks


def _damaged(path: Path, what: str) -> FileError:
    return FileError(f"{path}: {what}; download it again")
