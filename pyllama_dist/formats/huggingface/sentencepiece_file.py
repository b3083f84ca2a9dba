"""`tokenizer.json` from a SentencePiece model: the `tokenizer.model` of ChatGLM3."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import one_line
from pyllama_dist.formats.piece_merges import piece_merges

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers.normalizers import Normalizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces
_BPE = 2  # type of model
_SPACE = "▁"

# ChatGLM3's own code adds these behind the pieces; ChatGLM2 has the first five.
SPECIAL = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
STOPS = ("</s>", "<|user|>", "<|observation|>")


def tokenizer_json(data: bytes, path: Path, special: tuple[str, ...]) -> bytes:
    """The same tokenizer as a `tokenizer.json`.

    Args:
        data: the file's content.
        path: of the file, for errors.
        special: texts of the special tokens that follow its pieces.

    Raises:
        FileError: the file is damaged, or a kind of model that is not supported.
        UsageError: a library is not installed.
    """
    try:
        import tokenizers  # noqa: F401
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError:
        raise UsageError(
            f"{path}: a SentencePiece model takes a library of its own; "
            f"install it with `pip install pyllama-dist[sentencepiece]`"
        ) from None
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise _damaged(path, one_line(error)) from None
    if not model.pieces:
        raise _damaged(path, "it has no pieces")
    if model.trainer_spec.model_type != _BPE or model.trainer_spec.treat_whitespace_as_suffix:
        raise FileError(
            f"{path}: only SentencePiece models of type BPE with spaces before words are "
            f"supported; take a checkpoint with a tokenizer.json"
        )
    if len({piece.piece for piece in model.pieces}) < len(model.pieces):
        raise _damaged(path, "two of its pieces are equal")
    try:
        return _library(model, special).to_str().encode()
    except Exception as error:  # the library raises bare Exception
        raise _damaged(path, one_line(error)) from None


def _library(model: Any, special: tuple[str, ...]) -> "Library":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    def of_type(*types: int) -> list[str]:
        return [piece.piece for piece in model.pieces if piece.type in types]

    unknown = of_type(_UNKNOWN)
    own = of_type(_USER_DEFINED)
    library = Tokenizer(
        models.BPE(
            vocab={piece.piece: id for id, piece in enumerate(model.pieces)},
            merges=piece_merges({p.piece: p.score for p in model.pieces if p.type == _NORMAL}),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(of_type(_BYTE)),
            ignore_merges=bool(own),
        )
    )
    library.normalizer = _normalizer(model.normalizer_spec)
    if own:
        # SentencePiece cuts these out first, the longest where several begin.
        found = "|".join(map(_escaped, sorted(own, key=len, reverse=True)))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(found), "isolated")
    library.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * model.normalizer_spec.add_dummy_prefix
    )
    library.add_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in (*of_type(_CONTROL, _UNKNOWN), *special)
        ]
    )
    return library


def _normalizer(spec: Any) -> "Normalizer":
    """What SentencePiece does to a text before it looks for pieces, in its order."""
    from tokenizers import Regex, normalizers

    steps: list[Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A | \z"), ""),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _escaped(text: str) -> str:
    """`text` for the library's regular expressions, character by character."""
    return "".join(f"\\x{{{ord(char):x}}}" for char in text)


def _damaged(path: Path, what: str) -> FileError:
    return FileError(f"{path}: {what}; download it again")
