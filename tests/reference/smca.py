"""Reference of SMCA (equations 1 to 12): loops over positions and queries of one unpadded image."""

import math

import numpy as np

from .decoder import Weights, layer_norm, linear, relu

Levels = list[np.ndarray]  # (C, H, W) each


def within(weights: Weights, prefix: str) -> Weights:
    """Return the weights with a prefix, without the prefix."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max())
    return shifted / shifted.sum()


def rows(level: np.ndarray) -> np.ndarray:
    """Flatten (C, H, W) to (HW, C)."""
    return np.array([level[:, y, x] for y in range(level.shape[1]) for x in range(level.shape[2])])


def positions(level: np.ndarray) -> np.ndarray:
    """Return DETR's sine embedding, (HW, C)."""
    channels, height, width = level.shape
    table = []
    for y in range(height):
        for x in range(width):
            numbers = []
            for place, length in ((y, height), (x, width)):
                for pair in range(channels // 4):
                    angle = (place + 1) / length * 2 * math.pi / 10_000 ** (4 * pair / channels)
                    numbers += [math.sin(angle), math.cos(angle)]
            table.append(numbers)
    return np.array(table)


def attention(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, heads: int, log_prior: np.ndarray
) -> np.ndarray:
    """Return equation 1, or 5 and 6 with a prior (heads, N), for one projected query (C,)."""
    size = len(query) // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = [query[part] @ key[part] / math.sqrt(size) for key in keys]
        out.append(softmax(np.array(logits) + log_prior[head]) @ values[:, part])
    return np.concatenate(out)


def encoder_block(levels: Levels, weights: Weights, heads: int, kind: str) -> list[np.ndarray]:
    """Return the output of a block, (HW, C) for each level."""

    def own(part: str, index: int) -> str:
        """Return the name of the copy of a module for a level, or of the shared one."""
        copy = f"{part}.levels.{index}"
        return copy if any(name.startswith(copy) for name in weights) else f"{part}.levels.0"

    projected = []
    for index, level in enumerate(levels):
        placed = rows(level) + positions(level)
        query, key = np.split(linear(placed, weights, own("query_key", index)), 2, axis=1)
        projected.append((query, key, linear(rows(level), weights, own("value", index))))
    result = []
    for index, level in enumerate(levels):
        seen = projected if kind == "multi" else [projected[index]]
        keys = np.concatenate([key for _, key, _ in seen])
        values = np.concatenate([value for _, _, value in seen])
        flat = np.zeros((heads, len(keys)))
        attended = np.array([attention(q, keys, values, heads, flat) for q in projected[index][0]])
        x = rows(level) + linear(attended, weights, own("output", index))
        x = layer_norm(x, weights, own("norm", index))
        result.append(feed_forward(x, within(weights, own("ffn", index) + ".")))
    return result


def encoder(levels: Levels, weights: Weights, heads: int, blocks: list[str]) -> Levels:
    for index, kind in enumerate(blocks):
        block = within(weights, f"blocks.{index}.")
        tables = encoder_block(levels, block, heads, kind)
        levels = [t.T.reshape(level.shape) for t, level in zip(tables, levels, strict=True)]
    return levels


def feed_forward(x: np.ndarray, weights: Weights) -> np.ndarray:
    hidden = relu(linear(x, weights, "linear1"))
    return layer_norm(x + linear(hidden, weights, "linear2"), weights, "norm")


def mlp(x: np.ndarray, weights: Weights) -> np.ndarray:
    last = len(weights) // 2 - 1
    for layer in range(last):
        x = relu(linear(x, weights, f"layers.{layer}"))
    return linear(x, weights, f"layers.{last}")


def multi_head(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    weights: Weights,
    heads: int,
    log_prior: np.ndarray | None = None,
) -> np.ndarray:
    """Return the attention of queries (Q, C) with priors (Q, heads, N)."""
    wq, wk, wv = np.split(weights["in_proj_weight"], 3)
    bq, bk, bv = np.split(weights["in_proj_bias"], 3)
    keys, values = keys @ wk.T + bk, values @ wv.T + bv
    if log_prior is None:
        log_prior = np.zeros((len(queries), heads, len(keys)))
    attended = [
        attention(query @ wq.T + bq, keys, values, heads, prior)
        for query, prior in zip(queries, log_prior, strict=True)
    ]
    return linear(np.array(attended), weights, "out_proj")


def log_prior(
    guide: np.ndarray,
    reference: np.ndarray,
    level: np.ndarray,
    weights: Weights,
    heads: int,
    beta: float,
) -> np.ndarray:
    """Return equations 3, 4 and 6 for one query, (heads, HW)."""
    _, height, width = level.shape
    offsets = linear(guide, weights, "offsets").reshape(-1, 2)
    scales = np.ones_like(offsets)
    if "scales.weight" in weights:  # of each head: one for both sides, or one for each
        found = linear(guide, weights, "scales").reshape(len(offsets), -1)
        scales = np.broadcast_to(found, offsets.shape)
    out = np.empty((heads, height * width))
    for head in range(heads):
        own = head if len(offsets) == heads else 0
        center_x = reference[0] * width + offsets[own, 0]
        center_y = reference[1] * height + offsets[own, 1]
        for y in range(height):
            for x in range(width):
                far_x = scales[own, 0] ** 2 * (x - center_x) ** 2
                far_y = scales[own, 1] ** 2 * (y - center_y) ** 2
                out[head, y * width + x] = -(far_x + far_y) / beta
    return out


def co_attention(
    x: np.ndarray,
    query_positions: np.ndarray,
    guides: np.ndarray,
    references: np.ndarray,
    levels: Levels,
    weights: Weights,
    heads: int,
    beta: float,
) -> np.ndarray:
    prior = within(weights, "prior.")
    own = within(weights, "attention.")
    priors = [
        np.array(
            [
                log_prior(g, r, level, prior, heads, beta)
                for g, r in zip(guides, references, strict=True)
            ]
        )
        for level in levels
    ]
    values = [rows(level) for level in levels]
    keys = [rows(level) + positions(level) for level in levels]
    queries = x + query_positions
    if "level_logits.weight" in weights:  # equations 7 to 9
        shares = np.array([softmax(linear(guide, weights, "level_logits")) for guide in guides])
        attended = np.zeros_like(x)
        for index, level in enumerate(zip(keys, values, priors, strict=True)):
            key, value, bias = level
            attended += shares[:, [index]] * multi_head(queries, key, value, own, heads, bias)
    else:
        joined = [np.concatenate(part) for part in (keys, values)]
        attended = multi_head(queries, *joined, own, heads, np.concatenate(priors, axis=-1))
    return layer_norm(x + attended, weights, "norm")


def decoder(
    levels: Levels, weights: Weights, heads: int, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (S, Q, K) and boxes (S, Q, 4)."""
    query_positions = weights["query_embed.weight"]
    queries = np.zeros_like(query_positions)
    references = None
    logits, boxes = [], []
    for index in range(sum(name.endswith("guide_norm.weight") for name in weights)):
        layer = within(weights, f"layers.{index}.")
        guides = layer_norm(queries + query_positions, layer, "guide_norm")
        if references is None:
            references = mlp(guides, within(weights, "reference_points."))
        own = within(layer, "self_attention.")
        placed = queries + query_positions
        attended = multi_head(placed, placed, queries, within(own, "attention."), heads)
        queries = layer_norm(queries + attended, own, "norm")
        queries = co_attention(
            queries,
            query_positions,
            guides,
            sigmoid(references),
            levels,
            within(layer, "co_attention."),
            heads,
            beta,
        )
        queries = feed_forward(queries, within(layer, "ffn."))
        out = layer_norm(queries, weights, "norm")
        logits.append(linear(out, weights, "class_logits"))
        box = mlp(out, within(weights, "box_head."))
        box[:, :2] += references  # equation 12
        boxes.append(sigmoid(box))
    return np.array(logits), np.array(boxes)
