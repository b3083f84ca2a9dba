"""llama.cpp as a process that measures on request; see `orders.py`.

Runs in llama.cpp's environment, and measures as llama-bench does: random tokens, batches of 2048
in steps of 512, keys and values in float16.

    {"about": {}}
    {"load": {"shape": "...", "config": {...}, "dir": "...", "threads": 2, "seq_len": 640}}
    {"run": {"p": 512, "n": 0, "d": 0, "flash": true}}
"""

import ctypes
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf_shapes
import llama_cpp  # type: ignore[import-not-found]
import orders

BATCH = 2048
STEP = 512
BUFFER = re.compile(r"(\S+) model buffer size =\s+([\d.]+) MiB")


class Context:
    """A cache of keys and values for one model, and the way attention is computed."""

    def __init__(self, model: Any, vocab_size: int, seq_len: int, threads: int, flash: bool):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = seq_len
        params.n_batch = BATCH
        params.n_ubatch = STEP
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._handle = llama_cpp.llama_init_from_model(model, params)
        if not self._handle:
            raise ValueError(f"llama.cpp makes no context of {seq_len} positions")
        self._vocab_size = vocab_size
        self._depth = 0  # positions that are filled

    def free(self) -> None:
        llama_cpp.llama_free(self._handle)

    def run(self, p: int, n: int, d: int) -> dict[str, float]:
        """Times a prompt of p tokens and then n single ones, from a depth of d positions."""
        self._rewind(d)
        start = time.perf_counter()
        self._prefill(p)
        for _ in range(n):
            self._decode(1)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens_per_second": (p + n) / seconds}

    def _rewind(self, depth: int) -> None:
        """Brings the cache to this depth, with random tokens where there are too few."""
        if self._depth > depth:
            memory = llama_cpp.llama_get_memory(self._handle)
            llama_cpp.llama_memory_seq_rm(memory, 0, depth, -1)
            self._depth = depth
        self._prefill(depth - self._depth)

    def _prefill(self, n_tokens: int) -> None:
        for start in range(0, n_tokens, BATCH):
            self._decode(min(BATCH, n_tokens - start))

    def _decode(self, n_tokens: int) -> None:
        ids = (llama_cpp.llama_token * n_tokens)()  # the batch points into it
        for i in range(n_tokens):
            ids[i] = random.randrange(self._vocab_size)
        batch = llama_cpp.llama_batch_get_one(ids, n_tokens)
        status = llama_cpp.llama_decode(self._handle, batch)
        if status != 0:
            raise ValueError(f"llama_decode answers {status} to {n_tokens} tokens")
        llama_cpp.llama_synchronize(self._handle)
        self._depth += n_tokens


class Bench:
    """One model with two contexts: with flash attention, and without."""

    def __init__(self) -> None:
        self._buffers: dict[str, float] = {}
        self._log = llama_cpp.llama_log_callback(self._log_line)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._loaded: Path | None = None
        self._model: Any = None
        self._contexts: dict[bool, Context] = {}

    def _log_line(self, level: int, text: bytes, user_data: object) -> None:
        line = text.decode(errors="replace")
        if found := BUFFER.search(line):
            self._buffers[found[1]] = self._buffers.get(found[1], 0.0) + float(found[2])
        print(line, end="", file=sys.stderr, flush=True)

    def about(self) -> dict[str, str]:
        """What llama.cpp says of itself."""
        return {"system_info": llama_cpp.llama_print_system_info().decode().strip(" |")}

    def load(
        self,
        shape: str,
        config: dict[str, Any],
        dir: str,
        threads: int,
        seq_len: int,
    ) -> dict[str, Any]:
        """Makes the model's file if there is none, loads it, and makes the contexts."""
        arch = gguf_shapes.architecture(config)
        # A file that was made from another description of this shape is not taken.
        digest = crc32(json.dumps([arch, config], sort_keys=True).encode())
        path = Path(dir) / f"{shape}-{digest:08x}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            gguf_shapes.write(path, shape, config)
        for context in self._contexts.values():
            context.free()
        self._contexts = {}
        if self._loaded != path:
            self._load_model(path)
        self._contexts = {
            flash: Context(self._model, config["vocab_size"], seq_len, threads, flash)
            for flash in (False, True)
        }
        return {
            "architecture": arch,
            "bytes_per_token": gguf_shapes.bytes_per_token(config),
            "buffers_mib": self._buffers,
        }

    def _load_model(self, path: Path) -> None:
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._loaded = self._model = None
        self._buffers = {}
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        self._loaded = path

    def run(self, p: int, n: int, d: int, flash: bool) -> dict[str, float]:
        """As `Context.run`."""
        if not self._contexts:
            raise ValueError("no model is loaded")
        return self._contexts[flash].run(p, n, d)


def main() -> None:
    bench = Bench()
    orders.serve({"about": bench.about, "load": bench.load, "run": bench.run}, ValueError, OSError)


if __name__ == "__main__":
    main()
