"""Reference of a stage of the dynamic decoder (equations 8 to 14) for one unpadded image."""

import numpy as np

from .sampling import roi_align

Weights = dict[str, np.ndarray]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    out = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centered = x - x.mean(axis=-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-5)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def self_attention(queries: np.ndarray, weights: Weights, heads: int) -> np.ndarray:
    """Return equation 1 with Q = K = V."""
    projection = weights["self_attention.in_proj_weight"]
    bias = weights["self_attention.in_proj_bias"]
    query, key, value = np.split(queries @ projection.T + bias, 3, axis=1)
    size = queries.shape[1] // heads
    out = np.empty_like(queries)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = query[:, part] @ key[:, part].T / np.sqrt(size)
        attention = np.exp(logits - logits.max(axis=1, keepdims=True))
        attention /= attention.sum(axis=1, keepdims=True)
        out[:, part] = attention @ value[:, part]
    return linear(out, weights, "self_attention.out_proj")


def interaction(query: np.ndarray, region: np.ndarray, weights: Weights) -> np.ndarray:
    """Filter the region (P, C) of one query (C,) (equations 10 and 11).

    The output of residual filters is added to the region, in place of the last ReLU.
    """
    original = region
    channels = query.shape[0]
    filters = linear(query, weights, "interaction.filters")
    if "interaction.norm_reduce.weight" in weights:
        width = weights["interaction.norm_reduce.weight"].shape[0]
        reduce = filters[: channels * width].reshape(channels, width)
        expand = filters[channels * width :].reshape(width, channels)
        region = relu(layer_norm(region @ reduce, weights, "interaction.norm_reduce"))
        region = region @ expand
        if "interaction.norm_branch.weight" in weights:
            region = original + layer_norm(region, weights, "interaction.norm_branch")
        else:
            region = relu(layer_norm(region, weights, "interaction.norm_expand"))
    else:
        region = region @ filters.reshape(channels, channels)
        region = relu(layer_norm(region, weights, "interaction.norm"))
    out = linear(region.reshape(-1), weights, "interaction.readout.linear")
    return relu(layer_norm(out, weights, "interaction.readout.norm"))


def branch(query: np.ndarray, weights: Weights, name: str, layers: int) -> np.ndarray:
    for layer in range(layers):
        query = linear(query, weights, f"{name}.{3 * layer}")
        query = relu(layer_norm(query, weights, f"{name}.{3 * layer + 1}"))
    return query


def refine(box: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Move a box cx, cy, w, h by (dx, dy) / 2 of its size and scale it by at most 1e5 / 16."""
    dx, dy, dw, dh = deltas
    cx, cy, w, h = box
    largest = np.log(1e5 / 16)
    return np.array(
        [
            cx + dx / 2 * w,
            cy + dy / 2 * h,
            w * np.exp(min(dw, largest)),
            h * np.exp(min(dh, largest)),
        ]
    )


def decoder_stage(
    levels: list[np.ndarray],
    strides: list[int],
    image_size: tuple[int, int],
    queries: np.ndarray,
    boxes: np.ndarray,
    weights: Weights,
    heads: int,
    bins: int,
    canonical_size: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map queries (Q, C) and normalised boxes (Q, 4) to queries, logits and boxes."""
    height, width = image_size
    queries = layer_norm(
        queries + self_attention(queries, weights, heads), weights, "norm_attention"
    )
    updates = np.empty_like(queries)
    for index, (query, (cx, cy, w, h)) in enumerate(zip(queries, boxes, strict=True)):
        corners = np.array(
            [
                (cx - w / 2) * width,
                (cy - h / 2) * height,
                (cx + w / 2) * width,
                (cy + h / 2) * height,
            ]
        )
        region = roi_align(levels, strides, corners, bins, canonical_size=canonical_size)
        updates[index] = interaction(query, region, weights)
    queries = layer_norm(queries + updates, weights, "norm_interaction")
    hidden = relu(linear(queries, weights, "ffn.0"))
    queries = layer_norm(queries + linear(hidden, weights, "ffn.3"), weights, "norm_ffn")
    logits = linear(branch(queries, weights, "class_branch", 1), weights, "class_logits")
    deltas = linear(branch(queries, weights, "box_branch", 3), weights, "box_deltas")
    refined = np.array([refine(box, delta) for box, delta in zip(boxes, deltas, strict=True)])
    return queries, logits, refined
