"""Which files make a model: `model.m` and what tells its text, wherever they lie."""

from dataclasses import dataclass
from pathlib import Path

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import find_file, find_model
from pyllama_dist.formats.dllama.tokenizer_file import TokenizerFile
from pyllama_dist.text.added_tokens import AddedToken
from pyllama_dist.text.chat_template import ChatTemplate
from pyllama_dist.text.scored import ScoredVocabulary
from pyllama_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelPaths:
    """The files of a model.

    Attributes:
        model: the `.m` file.
        directory: of the model; its `generation_config.json` says how to sample.
        tokenizer: `tokenizer.json`, with a chat template beside it, or a `.t` file of
            distributed-llama, which has one in it.
    """

    model: Path
    directory: Path
    tokenizer: Path

    @classmethod
    def find(cls, model: Path, tokenizer: Path | None = None) -> "ModelPaths":
        """The files of a model; whether they exist is found when they are opened.

        Args:
            model: a directory made by `convert`, or a `.m` file.
            tokenizer: its tokenizer, a `.t` file or `tokenizer.json`. None takes the one beside
                the model.

        Raises:
            UsageError: several files could be meant.
        """
        file = find_model(model)
        if tokenizer is None:
            tokenizer = file.parent
        if tokenizer.is_dir():
            tokenizer = find_file(tokenizer, "tokenizer.json", ".t", "--tokenizer FILE.t")
        return cls(file, file.parent, tokenizer)

    @property
    def name(self) -> str:
        """The directory's name, or the file's where it is not called `model.m`."""
        model = self.model.resolve()
        return model.parent.name if model.name == "model.m" else model.stem

    def text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        """The tokenizer, and the chat template if there is one.

        Raises:
            UsageError: a library is not installed.
            FileError: a file is missing or damaged.
        """
        if self.tokenizer.suffix != ".t":
            if self.tokenizer.name != "tokenizer.json":
                raise FileError(f"{self.tokenizer}: give a .t file or a tokenizer.json")
            tokenizer = Tokenizer.open(self.tokenizer.parent)
            return tokenizer, ChatTemplate.open(self.tokenizer.parent, tokenizer)
        file = TokenizerFile.open(self.tokenizer)
        tokenizer = _tokenizer(file)
        return tokenizer, _template(file, tokenizer)


def _tokenizer(file: TokenizerFile) -> Tokenizer:
    vocabulary = ScoredVocabulary(file.pieces, file.scores, file.bos_id, file.eos_ids)
    added = [
        AddedToken(id, _name(file.pieces[id]), id in vocabulary.hidden)
        for id in sorted(vocabulary.special)
    ]
    prefix = [file.bos_id] if file.add_bos and file.bos_id is not None else []
    # Templates write the token that begins a text themselves, by this name.
    ends = file.eos_ids[:1]
    named = {"bos_token": file.bos_id, "eos_token": ends[0] if ends else None}
    texts = {name: _name(file.pieces[id]) for name, id in named.items() if id is not None}
    return Tokenizer(vocabulary, added, file.eos_ids, prefix, texts)


def _template(file: TokenizerFile, tokenizer: Tokenizer) -> ChatTemplate | None:
    if file.chat_template is None:
        return None
    try:
        from pyllama_dist.text.sandbox import SandboxedTemplate
    except ImportError:
        raise UsageError("chat needs the jinja2 library; install pyllama-dist[root]") from None
    return ChatTemplate(SandboxedTemplate(file.chat_template, str(file.path)), tokenizer)


def _name(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
