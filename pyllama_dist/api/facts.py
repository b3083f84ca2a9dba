"""What a client can ask about: the model, its tokens, the nodes."""

from collections.abc import Sequence

from pyllama_dist.api.dialect import Json
from pyllama_dist.api.errors import bad_request, of_engine
from pyllama_dist.api.metrics import NodeUse
from pyllama_dist.api.prompts import prompt_of
from pyllama_dist.api.requests import ChatRequest, DetokenizeRequest, TokenizeRequest
from pyllama_dist.api.service import Service
from pyllama_dist.errors import PyllamaError
from pyllama_dist.memory_use import resident_bytes


def models(service: Service) -> Json:
    """The model, under each of its names."""
    return {"object": "list", "data": [model(service, name) for name in service.names]}


def model(service: Service, name: str) -> Json:
    """What is known of the model.

    Raises:
        ApiError: there is none of this name, or it is not ready.
    """
    found = service.ready()
    service.check_model(name)
    config, seq_len = found.parts.file.config, found.engine.seq_len
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "pyllama-dist",
        "max_model_len": seq_len,
        "meta": {
            "n_ctx": seq_len,
            "n_ctx_train": config.max_seq_len,
            "n_vocab": config.vocab_size,
        },
    }


def health(service: Service) -> Json:
    """That it serves.

    Raises:
        ApiError: it does not.
    """
    service.ready()
    return {"status": "ok"}


def tokenize(service: Service, body: TokenizeRequest) -> Json:
    """Tokens of a text, or of a conversation.

    Raises:
        ApiError: there is neither.
    """
    model = service.ready()
    tokenizer = model.parts.tokenizer
    if body.messages is not None:
        tokens = list(prompt_of(service, ChatRequest(messages=body.messages)).tokens)
    elif (text := body.content if body.content is not None else body.prompt) is not None:
        try:
            tokens = tokenizer.encode_raw(text) if body.add_special else tokenizer.encode(text)
        except PyllamaError as error:
            raise of_engine(error) from None
    else:
        raise bad_request("nothing to tokenize; send content, prompt or messages", "content")
    found: list[object] = list(tokens)
    if body.with_pieces:
        pieces = tokenizer.tokens(tokens)
        found = [{"id": id, "piece": piece} for id, piece in zip(tokens, pieces, strict=True)]
    return {"tokens": found, "count": len(tokens), "max_model_len": model.engine.seq_len}


def detokenize(service: Service, body: DetokenizeRequest) -> Json:
    """The text of tokens."""
    tokenizer = service.ready().parts.tokenizer
    wrong = [id for id in body.tokens if id >= tokenizer.vocab_size]
    if wrong:
        most = tokenizer.vocab_size - 1
        raise bad_request(f"{wrong[0]} is no token id from 0 to {most}", "tokens")
    text = tokenizer.decode(body.tokens)
    return {"content": text, "prompt": text}


async def nodes(service: Service) -> Sequence[NodeUse]:
    """What steps have cost each node, the root first.

    Raises:
        ApiError: the model is not ready, or a node was lost.
    """
    model = service.ready()
    spent = model.engine.root.node.spent
    own = NodeUse(
        model.nodes[0],
        spent.compute_seconds,
        spent.sync_seconds,
        spent.bytes_moved,
        resident_bytes(peak=True),
    )
    workers = zip(model.nodes[1:], await service.usage(), strict=True)
    return [own, *(NodeUse.of(name, usage) for name, usage in workers)]


async def nodes_json(service: Service) -> Json:
    """The same, for the page; a lost node is told, not raised."""
    error = service.failure.message if service.failure else None
    found: Sequence[NodeUse] = ()
    if error is None and service.model is not None:
        found = await nodes(service)
        service.last_nodes = found
    else:
        found = service.last_nodes
    return {
        "nodes": [
            {
                "node": number,
                "address": node.name,
                "compute_seconds": node.compute_seconds,
                "sync_seconds": node.sync_seconds,
                "bytes": node.bytes_moved,
                "peak_bytes": node.peak_bytes,
                "lost": error is not None and node.name in error,
            }
            for number, node in enumerate(found)
        ],
        "error": error,
    }
