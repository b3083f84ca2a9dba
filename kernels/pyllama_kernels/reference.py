"""The NumPy reference implementation of every kernel: same names, arguments and results.

Tests compare the compiled kernels with them, and `PYLLAMA_KERNELS=reference` runs them alone.
Every kernel writes into its last argument. `rows` are rows of a batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_kernels.blocks import BLOCK, dequantize_q40, dequantize_q80, quantize_q80
from pyllama_kernels.layout import (
    ROW_BYTES,
    pack_activations,
    padded_rows,
    unpack_activations,
    unpack_weights,
)
from pyllama_kernels.pages import (
    KEPT_Q80,
    KV_BLOCK,
    PAGE,
    pages_of,
    read_positions,
    write_position,
)
from pyllama_kernels.plans import LISTED, PAIRS, lists, spans

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


def rms_norm(x: F32, weight: F32, epsilon: float, out: F32) -> None:
    """x * rsqrt(mean(x^2) + epsilon) * weight, row by row.

    Args:
        x: [rows, n] float32.
        weight: [n] float32.
        epsilon: added to the mean of squares.
        out: [rows, n] float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    mean = np.mean(np.square(x, dtype=np.float64), axis=1, keepdims=True)
    out[:] = x / np.sqrt(mean + epsilon) * weight


def quantize(x: F32, activations: U8) -> None:
    """Q80 as a matrix reads it.

    Args:
        x: [rows, n] float32.
        activations: uint8, the tiles of the batch: see `layout`.
    """
    rows, n = x.shape
    packed = quantize_q80(x).reshape(rows, n // 32, 34)
    scales = np.ascontiguousarray(packed[..., :2]).view("<f2")[..., 0].astype(np.float32)
    values = np.ascontiguousarray(packed[..., 2:]).view(np.int8).reshape(rows, n)
    pack_activations(values, scales, activations)


def pack_q80(x: F32, out: U8) -> None:
    """Q80 as it travels: [blocks, 32] float32 to [blocks, 34] uint8."""
    out[:] = quantize_q80(x)


def matmul_f32(x: F32, weight: F32, bias: F32, out: F32) -> None:
    """x @ weight.T + bias.

    Args:
        x: [rows, n] float32.
        weight: [m, n] float32.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    out[:] = x @ weight.T
    if bias.size:
        out += bias


def matmul_q40(activations: U8, rows: int, weight: U8, bias: F32, out: F32) -> None:
    """A Q80 batch times Q40 weights, plus bias.

    Args:
        activations: uint8, the tiles of the batch: see `layout`.
        rows: of the batch.
        weight: [groups, n / 32, 288] uint8, groups of 16 rows: see `layout`.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    _product(activations, rows, unpack_weights(weight)[: out.shape[1]], dequantize_q40, bias, out)


def matmul_q80(activations: U8, rows: int, weight: U8, bias: F32, out: F32) -> None:
    """A Q80 batch times Q80 weights, plus bias.

    Args:
        activations: as for `matmul_q40`.
        rows: of the batch.
        weight: [m, n / 32, 34] uint8, Q80 blocks.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    _product(activations, rows, weight, dequantize_q80, bias, out)


def _product(activations: U8, rows: int, blocks: U8, dequantize: Any, bias: F32, out: F32) -> None:
    m, n_blocks, size = blocks.shape
    x = unpack_activations(activations, rows, 32 * n_blocks)
    matmul_f32(x, dequantize(blocks.reshape(m, n_blocks * size)), bias, out)


def layer_norm(x: F32, weight: F32, bias: F32, epsilon: float, out: F32) -> None:
    """(x - mean) * rsqrt(variance + epsilon) * weight + bias, row by row.

    Args:
        x: [rows, n] float32.
        weight: [n] float32.
        bias: [n] float32.
        epsilon: added to the variance.
        out: [rows, n] float32.

    Source: Ba et al., Layer Normalization, 2016.
    """
    wide = x.astype(np.float64)
    mean, variance = wide.mean(axis=1, keepdims=True), wide.var(axis=1, keepdims=True)
    out[:] = (wide - mean) / np.sqrt(variance + epsilon) * weight + bias


def rope(positions: I64, cos: F32, sin: F32, halves: bool, x: F32) -> None:
    """Applies RoPE to the first `rotary_dim` dimensions of each head, in place.

    Args:
        positions: [rows] int64.
        cos: [seq_len, rotary_dim / 2] float32, by position and pair.
        sin: likewise.
        halves: pairs are (i, i + rotary_dim / 2) if true, else (2i, 2i + 1).
        x: [rows, heads, head_dim] float32, changed in place.

    Source: Su et al., RoFormer, 2021; the pairs of modeling_glm.py and modeling_glm4_moe.py of
    transformers.
    """
    pairs = cos.shape[1]
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]  # [rows, 1, pairs]
    if halves:
        first, second = x[:, :, :pairs], x[:, :, pairs : 2 * pairs]
    else:
        first, second = x[:, :, 0 : 2 * pairs : 2], x[:, :, 1 : 2 * pairs : 2]
    a, b = first.copy(), second.copy()
    first[:] = a * c - b * s
    second[:] = b * c + a * s


def concat(first: F32, second: F32, out: F32) -> None:
    """Heads side by side: [rows, heads, n], [rows, heads, m], [rows, heads, n + m] float32."""
    out[:] = np.concatenate([first, second], axis=2)


def store_keys(x: F32, seqs: I64, positions: I64, table: I64, kind: int, cache: U8) -> None:
    """Keeps each row's keys.

    Args:
        x: [rows, kv_heads, head_dim] float32.
        seqs: [rows] int64, the sequence of each row.
        positions: [rows] int64.
        table: [n_seqs, blocks per sequence] int64: see `pages`.
        kind: float type of the cache: see `pages`.
        cache: [n_blocks, kv_heads, BLOCK_PAGES, page bytes] uint8: see `pages`.
    """
    for row, (seq, position) in enumerate(zip(seqs, positions, strict=True)):
        page, lane = divmod(position % KV_BLOCK, PAGE)
        block = table[seq, position // KV_BLOCK]
        for head, key in enumerate(x[row]):
            write_position(cache[block, head, page], lane, key, kind, lanes_last=True)


def store_values(x: F32, seqs: I64, positions: I64, table: I64, kind: int, cache: U8) -> None:
    """Keeps each row's values: arguments as for `store_keys`."""
    for row, (seq, position) in enumerate(zip(seqs, positions, strict=True)):
        page, lane = divmod(position % KV_BLOCK, PAGE)
        block = table[seq, position // KV_BLOCK]
        for head, value in enumerate(x[row]):
            write_position(cache[block, head, page], lane, value, kind, lanes_last=False)


def attention(
    query: F32,
    keys: U8,
    values: U8,
    kind: int,
    seqs: I64,
    positions: I64,
    table: I64,
    first: int,
    group: int,
    scale: float,
    mask: F32,
    out: F32,
) -> None:
    """softmax(q . k * scale + mask) . v over the positions 0 to the row's own.

    Args:
        query: [rows, heads, head_dim] float32.
        keys: [n_blocks, kv_heads, BLOCK_PAGES, page bytes] uint8: see `pages`.
        values: likewise; or the same array, then values are the first numbers of the keys.
        kind: float type of the cache; keys of Q80 meet queries that are rounded to Q80.
        seqs: [rows] int64.
        positions: [rows] int64.
        table: [n_seqs, blocks per sequence] int64.
        first: head h reads key head (first + h) // group.
        group: query heads that share a key head.
        scale: of the scores.
        mask: [rows, seq_len] float32, 0 or -inf; or [0, 0] for none.
        out: [rows, heads, value_dim] float32.

    Source: Vaswani et al., 2017; shared key heads: Ainslie et al., 2023; latent: DeepSeek-V2, 2024.
    """
    n, value_dim, from_keys = query.shape[2], out.shape[2], keys is values
    if kind == KEPT_Q80:
        query = dequantize_q80(quantize_q80(query))
    for row, (seq, position) in enumerate(zip(seqs, positions, strict=True)):
        for head in range(query.shape[1]):
            kv_head = (first + head) // group
            # [context, head_dim]
            k, v = (
                read_positions(
                    pages_of(held, table[seq], kv_head, position + 1), n, kind, lanes_last=is_keys
                )[: position + 1]
                for held, is_keys in ((keys, True), (values, from_keys))
            )
            v = v[:, :value_dim]
            scores = k @ query[row, head] * np.float32(scale)
            if mask.size:
                scores += mask[row, : position + 1]
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()


def select(
    query: F32,
    weights: F32,
    keys: U8,
    kind: int,
    seqs: I64,
    positions: I64,
    table: I64,
    top_k: int,
    scale: float,
    out: F32,
) -> None:
    """0 at the top_k positions of the highest scores, -inf elsewhere: the indexer of GLM-5.

    score = sum over heads of weight * relu(q . k * scale); of equal scores the earlier wins.

    Args:
        query: [rows, heads, head_dim] float32.
        weights: [rows, heads] float32.
        keys: [n_blocks, 1, BLOCK_PAGES, page bytes] uint8: see `pages`.
        kind: float type of the cache.
        seqs: [rows] int64.
        positions: [rows] int64; only those up to the row's own are looked at.
        table: [n_seqs, blocks per sequence] int64.
        top_k: how many are selected.
        scale: of the products.
        out: [rows, seq_len] float32.

    Source: DeepSeek-V3.2, 2025; modeling_glm_moe_dsa.py of transformers.
    """
    n = query.shape[2]
    out[:] = -np.inf
    for row, (seq, position) in enumerate(zip(seqs, positions, strict=True)):
        pages = pages_of(keys, table[seq], 0, position + 1)
        k = read_positions(pages, n, kind, lanes_last=True)[: position + 1]
        products = np.maximum(query[row] @ k.T * np.float32(scale), 0)  # [heads, context]
        scores = weights[row] @ products
        chosen = np.argsort(-scores, kind="stable")[:top_k]
        out[row, chosen] = 0


@np.errstate(over="ignore", invalid="ignore")  # a score may be anything
def route(
    x: F32,
    bias: F32,
    softmax: bool,
    active: int,
    groups: int,
    active_groups: int,
    normalize: bool,
    scale: float,
    out: F32,
) -> None:
    """The weight of each expert in a row, 0 for those that are not chosen.

    The `active` highest of score + bias are chosen, in the groups whose best two have the largest
    sums; of equal ones the first. NaN counts as the lowest.

    Args:
        x: [rows, experts] float32, the router's outputs.
        bias: [experts] float32, or [0] for none.
        softmax: scores are softmax(x) over a row if true, else sigmoid(x).
        active: experts that are chosen for each row.
        groups: of equally many experts that lie side by side.
        active_groups: of which experts are chosen.
        normalize: weights are scores divided by the sum of the chosen ones, else scores.
        scale: of the weights.
        out: [rows, experts] float32.

    Source: modeling_glm4_moe.py of transformers; DeepSeek-V3, 2024.
    """
    if softmax:
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-x))
    ranks = _or_lowest(scores + bias if bias.size else scores)
    if active_groups < groups:
        by_group = ranks.reshape(len(x), groups, x.shape[1] // groups)
        best_two = _or_lowest(np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2))
        others = np.argsort(-best_two, axis=1, kind="stable")[:, active_groups:]
        np.put_along_axis(by_group, others[:, :, None], -np.inf, axis=1)
        ranks = by_group.reshape(x.shape)
    chosen = np.argsort(-ranks, axis=1, kind="stable")[:, :active]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if normalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    out[:] = 0
    np.put_along_axis(out, chosen, weights * np.float32(scale), axis=1)


def _or_lowest(x: F32) -> F32:
    return np.where(np.isnan(x), np.float32(-np.inf), x)


def make_plan(route: F32, active: int, plan: I64) -> None:
    """Which rows go to which expert: see `plans`.

    Args:
        route: [rows, experts] float32; what is not 0 is a pair, but for more than `active` of them.
        active: experts that are chosen for each row.
        plan: int64, made for so many experts and at least rows * active pairs.
    """
    experts, firsts, tiles, rows, chosen, pairs, _ = lists(plan)
    by_row = [np.flatnonzero(weights)[:active] for weights in route]
    found = sorted((expert, row) for row, those in enumerate(by_row) for expert in those)
    numbers = {pair: number for number, pair in enumerate(found)}
    listed, counts = np.unique([expert for expert, _ in found], return_counts=True)
    plan[PAIRS], plan[LISTED] = len(found), len(listed)
    experts[: len(listed)] = listed
    firsts[: len(listed) + 1] = np.cumsum([0, *counts])
    tiles[: len(listed) + 1] = np.cumsum([0, *map(padded_rows, counts)])
    rows[: len(found)] = [row for _, row in found]
    chosen[: len(route) * active] = pairs[: len(route) * active] = -1
    for row, those in enumerate(by_row):
        for place, expert in enumerate(those, row * active):
            chosen[place], pairs[place] = expert, numbers[expert, row]


def quantize_experts(x: F32, plan: I64, activations: U8) -> None:
    """Q80 as the matrices of experts read it.

    Args:
        x: [pairs, n] float32.
        plan: int64, see `plans`.
        activations: uint8, the tiles of each expert's rows.
    """
    for _, pairs, tile in spans(plan):
        quantize(x[pairs], activations[tile * (x.shape[1] // BLOCK) * ROW_BYTES :])


def combine(x: F32, route: F32, plan: I64, active: int, out: F32) -> None:
    """Sums of the rows of experts times their weights, in the order of the experts.

    Args:
        x: [pairs, n] float32.
        route: [rows, experts] float32, the weights.
        plan: int64, see `plans`.
        active: experts that are chosen for each row.
        out: [rows, n] float32.
    """
    _, _, _, _, chosen, pairs, _ = lists(plan)
    for row, total in enumerate(out):
        total[:] = 0
        for place in range(row * active, (row + 1) * active):
            if pairs[place] >= 0:
                total += route[row, chosen[place]] * x[pairs[place]]


def silu_mul(gate: F32, up: F32, out: F32) -> None:
    """gate * sigmoid(gate) * up, [n] float32 each. Source: Shazeer, GLU variants, 2020."""
    with np.errstate(over="ignore"):  # exp of a large number: the quotient is 0, as it should be
        out[:] = gate / (1 + np.exp(-gate)) * up


def merge_f32(parts: F32, out: F32) -> None:
    """The sum of [parts, n] float32 over parts, added one after the other."""
    out[:] = parts[0]
    for part in parts[1:]:
        out += part


def merge_q80(parts: U8, out: F32) -> None:
    """The sum of [parts, blocks, 34] uint8 over parts as [blocks, 32] float32."""
    out[:] = 0
    for part in parts:
        out += dequantize_q80(part)


def add(x: F32, out: F32) -> None:
    """out += x, [n] float32 each."""
    out += x


def gather(x: F32, index: I64, out: F32) -> None:
    """out[i] = x[index[i]]: [rows, n] float32, [k] int64, [k, n] float32."""
    out[:] = x[index]


def adjust(
    logits: F32,
    seen: I32,
    counts: I32,
    repetition: float,
    presence: float,
    frequency: float,
    biased: I32,
    bias: F32,
    mask: U32,
    out: F32,
) -> None:
    """out = logits with penalties for tokens that the text has already, a bias, and a mask.

    A logit of a token that was seen is divided by `repetition` if it is positive, else multiplied
    with it; one of a token that was generated is lowered by presence + frequency * its count.

    Args:
        logits: [vocab] float32.
        seen: ids of the tokens of the text, each once, int32.
        counts: how often each of these was generated, int32; 0: it is in the prompt alone.
        repetition: 1 for none.
        presence: 0 for none.
        frequency: 0 for none.
        biased: ids, each once, int32.
        bias: what is added to the logits of these, float32.
        mask: bit i % 32 of word i // 32 says whether token i is allowed, uint32; [0]: all are.
        out: [vocab] float32.

    Source: Keskar et al., CTRL, 2019 (repetition); OpenAI's API reference (the others).
    """
    out[: logits.size] = logits
    x, factor = out[seen], np.float32(repetition)
    x = np.where(x > 0, x / factor, x * factor)
    lowered = np.float32(frequency) * counts.astype(np.float32) + np.float32(presence)
    out[seen] = x - np.where(counts > 0, lowered, np.float32(0))
    out[biased] += bias
    if mask.size:
        allowed = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")
        out[: logits.size][allowed[: logits.size] == 0] = -np.inf


def sample(
    logits: F32,
    top: float,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    weights: F32,
    tokens: I32,
) -> int:
    """Draws one of the tokens that top-k, then top-p, then min-p leave.

    Each is drawn with a probability in proportion to its weight, e^((logit - top) *
    inverse_temperature). Of equally likely tokens the first are left.

    Args:
        logits: [vocab] float32.
        top: the highest of them.
        inverse_temperature: 1 / temperature.
        top_k: so many of the most likely tokens are left; 0: all.
        top_p: the smallest set of most likely tokens that reaches this probability is left; all
            tokens if it is not between 0 and 1.
        min_p: tokens are left whose weight is at least this fraction of the highest.
        uniform: from 0 to below 1; which token of those left, in their order, each as wide as its
            weight.
        weights: float32, and
        tokens: int32: memory for the kernels.

    Source: Fan et al., Hierarchical Neural Story Generation, 2018 (top-k); Holtzman et al., The
    Curious Case of Neural Text Degeneration, 2019 (top-p); Nguyen et al., Turning Up the Heat,
    2024 (min-p).
    """
    with np.errstate(over="ignore"):
        found = np.exp((logits - np.float32(top)) * np.float32(inverse_temperature))
    return draw(found, top_k, top_p, min_p, uniform)


def draw(weights: F32, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """The second half of `sample`: from weights to a token."""
    likely = weights.astype(np.float64)
    left = np.argsort(-likely, kind="stable")[: top_k or None]
    if 0 < top_p < 1:
        before = np.cumsum(likely[left]) - likely[left]
        left = left[before < top_p * likely[left].sum()]
    left = np.sort(left[likely[left] >= np.float32(min_p)])
    reach = np.cumsum(likely[left])
    place = np.searchsorted(reach, uniform * reach[-1], side="right")
    return int(left[min(place, left.size - 1)])
