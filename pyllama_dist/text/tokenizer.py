"""The checkpoint's own tokenizer, through the tokenizers library."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import one_line, read_json
from pyllama_dist.text.added_tokens import AddedToken, Finder
from pyllama_dist.text.detokenize import DetokenizeStream
from pyllama_dist.text.named_tokens import FILE as NAMES_FILE
from pyllama_dist.text.named_tokens import NAMES, named_texts
from pyllama_dist.text.special import SIGN, Rendered, unmarked, well_formed
from pyllama_dist.text.vocabulary import LibraryVocabulary, Vocabulary

TOKENIZER_LIMIT = 256 << 20  # bytes; GLM's file has 20 MB
CONFIG_LIMIT = 1 << 20  # bytes
MAX_ID = 1 << 24  # no vocabulary comes near
STOP_STRINGS = ("<|endoftext|>", "<|user|>", "<|observation|>")
PREFIX_STRINGS = ("[gMASK]", "<sop>")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        added: the added tokens by their text (`<|user|>`, `<think>`, ...).
        eos_ids: ids that end an answer.
        prefix: ids that begin a prompt without a template.
        named: texts of special tokens, by the names that templates have for them.
        vocab_size: one more than the highest id.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        added: Iterable[AddedToken],
        eos_ids: Iterable[int],
        prefix: Sequence[int] = (),
        named: Mapping[str, str] | None = None,
    ) -> None:
        """`vocabulary` knows no added tokens."""
        self.added: Mapping[str, AddedToken] = {token.text: token for token in added}
        self.eos_ids = frozenset(eos_ids)
        self.prefix = tuple(prefix)
        self.named = named or {}
        self._vocabulary = vocabulary
        self._texts = {token.id: text for text, token in self.added.items()}
        self._hidden = self.eos_ids | {token.id for token in self.added.values() if token.special}
        self._n_ids = MAX_ID
        self.vocab_size = max(vocabulary.size, 1 + max(self._texts, default=-1))
        normalized = {text: token for text, token in self.added.items() if token.normalized}
        self._raw = Finder({text: t for text, t in self.added.items() if not t.normalized})
        self._to_sign = Finder(normalized)
        self._signed = Finder(
            {vocabulary.normalize(SIGN + text): token for text, token in normalized.items()}
        )

    @classmethod
    def open(cls, model_dir: Path) -> "Tokenizer":
        """Reads `tokenizer.json` of a directory, and two files that need not be there.

        As with transformers, `tokenizer_config.json` names the tokens of templates; a token that
        it names is special even if it is an ordinary one of the vocabulary. Ids that end an answer
        are those of `generation_config.json` and the `eos_token`.

        Raises:
            UsageError: the tokenizers library is not installed.
            FileError: a file is damaged, or tokenizer.json is missing.
        """
        try:
            import tokenizers  # noqa: F401
        except ImportError:
            raise UsageError(
                "text needs the tokenizers library; install pyllama-dist[root]"
            ) from None
        path = model_dir / "tokenizer.json"
        fields = read_json(path, TOKENIZER_LIMIT)
        model = fields.get("model")
        if not (isinstance(model, dict) and isinstance(model.get("vocab"), dict)):
            raise FileError(
                f"{path} has no vocabulary by name, as BPE has; only such tokenizers are supported"
            )
        generation = model_dir / "generation_config.json"
        settings = _settings(generation)
        names = model_dir / NAMES_FILE
        named = named_texts(_settings(names)) if names.exists() else None
        added = _added_tokens(fields.get("added_tokens"), path)
        known = {token.text for token in added}
        added += [
            AddedToken(model["vocab"][text], text, special=True)
            for text in dict.fromkeys((named or {}).values())
            if text and text not in known and isinstance(model["vocab"].get(text), int)
        ]
        try:
            vocabulary = LibraryVocabulary(
                {**fields, "model": _without(model, {token.text for token in added})}
            )
        except Exception as error:  # the library raises bare Exception
            raise FileError(
                f"{path} is not a tokenizer that the tokenizers library reads: {one_line(error)}; "
                "copy it again from the checkpoint"
            ) from None
        for token in added:
            if vocabulary.name(token.id) not in (None, token.text):
                raise FileError(
                    f"{path} gives id {token.id} to {token.text!r} and to another token; "
                    "copy it again from the checkpoint"
                )
        ids = {token.text: token.id for token in added}
        eos_ids = _eos_ids(settings, generation)
        if eos_ids is None:
            eos_ids = [ids[text] for text in STOP_STRINGS if text in ids]
        if named is None:
            named = _named_by_id(settings, added)
        if (eos := named.get("eos_token")) in ids:
            eos_ids = [*eos_ids, ids[eos]]
        prefix = _prefix(fields.get("post_processor"), ids)
        texts = {name: text or "" for name, text in named.items()}
        return cls(vocabulary, added, eos_ids, prefix, texts)

    def fitted(self, n_ids: int) -> "Tokenizer":
        """This tokenizer for a model of `n_ids` ids.

        Checkpoints name added tokens that their model has no row for. A prompt that has one is
        refused; nothing else ever needs them.

        Raises:
            FileError: its vocabulary goes beyond them.
        """
        if self._vocabulary.size > n_ids:
            raise FileError(
                f"the tokenizer has {self._vocabulary.size} tokens, the model {n_ids}; "
                "they are of different checkpoints"
            )
        fitted = copy.copy(self)
        fitted._n_ids = n_ids
        known = (id for id in self._texts if id < n_ids)
        fitted.vocab_size = max(self._vocabulary.size, 1 + max(known, default=-1))
        return fitted

    def _known(self, ids: list[int]) -> list[int]:
        """`ids`, each of which the model has."""
        highest = max(ids, default=-1)
        if highest >= self._n_ids:
            raise FileError(
                f"the prompt has {self._texts.get(highest)!r}, token {highest}, and the model has "
                f"{self._n_ids}; leave it out of the chat template, or take its model"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing in it is special and nothing is prepended.

        Lone surrogates are encoded as U+FFFD.
        """
        return self._vocabulary.encode(self._vocabulary.normalize(well_formed(text)), True)

    def encode_template(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered conversation: what the template wrote whole is special.

        Nothing is prepended: templates write `[gMASK]<sop>` themselves (see `special`).

        Raises:
            FileError: the model has no such token, see `fitted`.
        """
        ids: list[int] = []
        for part in self._raw.parts(rendered.marked):
            if part.token is not None:
                ids.append(part.token.id)
            else:
                ids += self._encode_between(part.text, part.start == 0)
        return self._known(ids)

    def _encode_between(self, marked: str, first: bool) -> list[int]:
        """Ids of text between added tokens that are not normalized.

        Normalization may make an added token of what a user wrote. So those that are whole before
        it are signed, and only with the sign are they found after it.
        """
        signed = "".join(
            part.text
            if part.token is None
            else part.text.replace(part.token.text, SIGN + part.token.text)
            for part in self._to_sign.parts(marked)
        )
        ids: list[int] = []
        for part in self._signed.parts(self._vocabulary.normalize(signed)):
            if part.token is not None:
                ids.append(part.token.id)
            else:
                ids += self._vocabulary.encode(unmarked(part.text), first and part.start == 0)
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a prompt without a template: `prefix`, then `text`.

        Raises:
            FileError: the model has no such token, see `fitted`.
        """
        return self._known([*self.prefix, *self.encode(text)])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special and unknown ones give nothing, invalid UTF-8 gives U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def stream(self) -> DetokenizeStream:
        """Decodes one token at a time; all it returns, joined, is `decode` of the same ids."""
        return DetokenizeStream(self._piece)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """One printable piece for each id: `hello`, `<|user|>`, `\\n`, `\\xe4`; '' if unknown."""
        return [self._texts.get(token) or _printable(self._bytes(token, False)) for token in ids]

    def token_bytes(self, token: int) -> bytes:
        """What `token` adds to a text after another one, special or not; nothing if unknown."""
        return self._bytes(token, False)

    def _piece(self, token: int, first: bool) -> bytes | None:
        return None if token in self._hidden else self._bytes(token, first)

    def _bytes(self, token: int, first: bool) -> bytes:
        """What `token` adds to the text, special or not; `first` if no token came before it."""
        if token in self._texts:
            return well_formed(self._texts[token]).encode()
        return self._vocabulary.piece(token, first)


def _printable(data: bytes) -> str:
    text = data.decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _without(model: dict[str, Any], added: set[str]) -> dict[str, Any]:
    """The model of tokenizer.json without added tokens, so that plain text never gives one.

    `ignore_merges` takes a vocabulary entry that is a whole word (`/nothink`) as it is. Entries
    that merges use, single characters and the unknown token stay: text needs them.
    """
    doubled = {text for text in added & model["vocab"].keys() if len(text) > 1}
    if not doubled:
        return model
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    used = {text for pair in pairs for text in (*pair, "".join(pair))} | {model.get("unk_token")}
    return model | {
        "vocab": {
            text: token
            for text, token in model["vocab"].items()
            if text not in doubled or text in used
        }
    }


def _prefix(post_processor: object, ids: Mapping[str, int]) -> list[int]:
    """What begins a plain prompt: what the post-processor puts first, else GLM's prefix.

    Args:
        post_processor: that of tokenizer.json; parts of it may be a list.
        ids: of the added tokens, by their text.
    """
    match post_processor:
        case {"type": "Sequence", "processors": [*parts]}:
            return next(filter(None, (_prefix(part, ids) for part in parts)), [])
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": _}, *_] as parts}:
            return list(_first_ids(parts, ids))
    known = [ids[text] for text in PREFIX_STRINGS if text in ids]
    return known if len(known) == len(PREFIX_STRINGS) else []


def _first_ids(parts: Iterable[object], ids: Mapping[str, int]) -> Iterator[int]:
    """Ids of the special tokens that a template has before any text."""
    for part in parts:
        match part:
            case {"SpecialToken": {"id": str(text)}}:
                if text in ids:
                    yield ids[text]
            case _:
                return


def _added_tokens(value: object, path: Path) -> list[AddedToken]:
    """The checked `added_tokens` of tokenizer.json; entries without text are left out."""
    if not isinstance(value, list | None):
        raise FileError(f"{path}: added_tokens is no list; copy it again from the checkpoint")
    tokens = []
    for number, entry in enumerate(value or []):
        match entry:
            case {"id": int(id), "content": str(text), **rest} if 0 <= id < MAX_ID:
                if text:
                    flags = {flag: rest.get(flag) is True for flag in _FLAGS}
                    tokens.append(AddedToken(id, text, **flags))
            case _:
                raise FileError(
                    f"{path}: added_tokens[{number}] has no id below {MAX_ID} with its content; "
                    "copy it again from the checkpoint"
                )
    return tokens


def _settings(path: Path) -> dict[str, object]:
    """A JSON file that need not be there."""
    return read_json(path, CONFIG_LIMIT) if path.exists() else {}


def _eos_ids(settings: Mapping[str, object], path: Path) -> list[int] | None:
    """`eos_token_id` of generation_config.json, None if the key is not there."""
    value = settings.get("eos_token_id")
    if value is None:
        return None
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(id) is int and 0 <= id < MAX_ID for id in ids):
        raise FileError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return ids


def _named_by_id(
    settings: Mapping[str, object], added: Iterable[AddedToken]
) -> dict[str, str | None]:
    """The tokens that generation_config.json names, where there is no tokenizer_config.json."""
    texts = {token.id: token.text for token in added}
    named: dict[str, str | None] = {}
    for name in NAMES:
        ids = settings.get(f"{name}_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and first in texts:
            named[name] = texts[first]
    return named
