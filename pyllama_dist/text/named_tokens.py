"""Special tokens that chat templates know by a name, such as `bos_token`."""

from collections.abc import Mapping

FILE = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def named_texts(settings: Mapping[str, object]) -> dict[str, str | None]:
    """The names in a parsed `tokenizer_config.json` with the text of each; None if it has none.

    >>> named_texts({"bos_token": {"content": "<s>"}, "eos_token": None, "model_max_length": 9})
    {'bos_token': '<s>', 'eos_token': None}
    """
    named: dict[str, str | None] = {}
    for name in NAMES:
        match settings.get(name, 0):
            case str(text) | {"content": str(text)}:
                named[name] = text
            case None:
                named[name] = None
    return named
