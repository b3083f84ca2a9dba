"""The text files of a model directory, made from the metadata of a GGUF file.

A GGUF file has a tokenizer's tokens, merges or scores, but of its rules for cutting text only a
name (`tokenizer.ggml.pre`); the rules themselves are here.
"""

from typing import TYPE_CHECKING

from pyllama_dist.errors import FileError
from pyllama_dist.files import one_line
from pyllama_dist.formats.gguf.file import GgufFile
from pyllama_dist.formats.piece_merges import piece_merges
from pyllama_dist.formats.sidecar_checks import GENERATION_FILE, as_json
from pyllama_dist.text.named_tokens import FILE as NAMES_FILE
from pyllama_dist.text.tokenizer import MAX_ID

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # token_type

# Words, numbers of up to three digits (GLM, Llama 3) or one (Qwen), signs, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {
    "glm4": r"\p{N}{1,3}",
    "chatglm-bpe": r"\p{N}{1,3}",
    "llama-bpe": r"\p{N}{1,3}",
    "llama-v3": r"\p{N}{1,3}",
    "llama3": r"\p{N}{1,3}",
    "qwen2": r"\p{N}",
}

# Tokens that end an answer wherever they are, and those that do in a vocabulary with all of them.
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
_GLM_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# Names of templates, by those of the file.
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # as the format spells it
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}

_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k"}


def sidecar_files(file: GgufFile, warnings: list[str]) -> dict[str, bytes]:
    """`tokenizer.json`, `chat_template.jinja` and `generation_config.json`, by name.

    Args:
        file: the file.
        warnings: gets a line for each that cannot be made.

    Raises:
        FileError: the metadata are damaged, or the tokenizers library is not installed.
    """
    files: dict[str, bytes] = {}
    tokenizer = _tokenizer(file, warnings)
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
    template = file.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    else:
        warnings.append("the file has no chat template: the model cannot chat")
    tokens = [text for text, _ in _tokens(file)]
    ends = eos_ids(file)
    named: dict[str, object] = {}
    for key, name in _NAMED.items():
        id = file.get(f"{_PREFIX}{key}_token_id")
        if isinstance(id, int) and id < len(tokens):
            named[name] = tokens[id]
        elif id is not None and tokens:
            warnings.append(f"{key}_token_id is {id!r}, which is no token of the file: left out")
    if named:
        files[NAMES_FILE] = as_json(named)
    generation: dict[str, object] = {"eos_token_id": ends}
    for key, name in _SAMPLING.items():
        if file.get(f"general.sampling.{key}") is not None:
            generation[name] = file.number(f"general.sampling.{key}")
    files[GENERATION_FILE] = as_json(generation)
    return files


def eos_ids(file: GgufFile) -> list[int]:
    """Ids of the tokens that end an answer: those that the file names, and others by their text.

    Raises:
        FileError: the metadata are damaged.
    """
    keys = [f"{_PREFIX}{kind}_token_id" for kind in ("eos", "eot", "eom")]
    ids = [file.integer(key) for key in keys if file.get(key) is not None]
    controls = {
        text: token
        for token, (text, kind) in enumerate(_tokens(file))
        if kind == _CONTROL and text in _ENDS + _GLM_ENDS
    }
    glm = controls.keys() >= set(_GLM_ENDS)
    ids += [controls[end] for end in _ENDS + _GLM_ENDS * glm if end in controls]
    n_tokens = len(_tokens(file)) or MAX_ID
    return [id for id in dict.fromkeys(ids) if id < n_tokens]


def _tokens(file: GgufFile) -> list[tuple[str, int]]:
    """Text and type of each token."""
    texts = file.items(f"{_PREFIX}tokens", str)
    types = file.items(f"{_PREFIX}token_type", int) or [_NORMAL] * len(texts)
    if len(texts) != len(types):
        raise file.damaged(f"{len(texts)} tokens, but {len(types)} token types")
    return list(zip(texts, types, strict=True))


def _tokenizer(file: GgufFile, warnings: list[str]) -> bytes | None:
    """`tokenizer.json`; None and a warning where its rules are not known."""
    model, pre = file.get(f"{_PREFIX}model"), file.get(f"{_PREFIX}pre")
    if not (model == "llama" or (model == "gpt2" and pre in _DIGITS)):
        warnings.append(
            f"tokenizer {model!r}, {pre!r} is not known: no tokenizer.json was made, copy the one "
            f"of the model's safetensors checkpoint into the directory"
        )
        return None
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise FileError(
            f"{file.path}: its tokenizer takes the tokenizers library; "
            f"install it with `pip install pyllama-dist[gguf]`"
        ) from None
    # Rows of the embedding that no token uses have texts such as [PAD151365].
    used = [(text, (id, kind)) for id, (text, kind) in enumerate(_tokens(file)) if kind != _UNUSED]
    tokens = dict(used)
    if len(tokens) < len(used):
        raise file.damaged("two of its tokens have the same text")
    added = {
        text: token for text, (token, kind) in tokens.items() if kind in (_CONTROL, _USER_DEFINED)
    }
    vocab = {text: token for text, (token, _) in tokens.items() if text not in added}
    if sorted(added.values()) != list(range(len(vocab), len(vocab) + len(added))):
        # The library numbers added tokens onwards from the vocabulary, unless they are in it.
        vocab |= added
    try:
        library = (
            _sentencepiece(file, vocab, tokens)
            if model == "llama"
            else _byte_level(file, vocab, str(pre))
        )
        _add(library, file, added, tokens, starts=model == "llama" or str(pre).startswith("llama"))
        return library.to_str().encode()
    except FileError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise file.damaged(f"no sound tokenizer: {one_line(error)}") from None


def _byte_level(file: GgufFile, vocab: dict[str, int], pre: str) -> "Library":
    """Byte-level BPE, as GLM, Llama 3 and Qwen have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in file.items(f"{_PREFIX}merges", str)]
    library = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre != "qwen2"))
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT.format(digits=_DIGITS[pre])), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def _sentencepiece(
    file: GgufFile, vocab: dict[str, int], tokens: dict[str, tuple[int, int]]
) -> "Library":
    """SentencePiece BPE, as Llama 2 and ChatGLM3 have it: bytes where no piece fits."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.items(f"{_PREFIX}scores", float)
    if len(scores) != len(file.items(f"{_PREFIX}tokens", str)):
        raise file.damaged(f"{len(scores)} scores of tokens, not one of each")
    normal = {text: token for text, (token, kind) in tokens.items() if kind == _NORMAL}
    unknown = next((text for text, (_, kind) in tokens.items() if kind == _UNKNOWN), None)
    library = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=piece_merges({text: scores[token] for text, token in normal.items()}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = file.get(f"{_PREFIX}add_space_prefix") is not False
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * spaced + [normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * spaced
    )
    return library


def _add(
    library: "Library",
    file: GgufFile,
    added: dict[str, int],
    tokens: dict[str, tuple[int, int]],
    *,
    starts: bool,
) -> None:
    """Adds the tokens outside BPE, and the one that begins every text, which `starts` defaults."""
    from tokenizers import AddedToken, processors

    library.add_tokens(
        [
            AddedToken(text, special=tokens[text][1] == _CONTROL, normalized=False)
            for text in sorted(added, key=lambda text: added[text])
        ]
    )
    add_bos = file.get(f"{_PREFIX}add_bos_token")
    bos_id = file.get(f"{_PREFIX}bos_token_id")
    if (starts if add_bos is None else add_bos) and isinstance(bos_id, int):
        bos = library.id_to_token(bos_id)
        if bos is not None:
            library.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
            )
