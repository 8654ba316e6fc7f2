"""Count the floating-point operations of a training step, from a model's config.

Counted are matrix multiplications, as in the usual figure of "model FLOPs": two operations for
each weight and token, the same for each product of attention, and twice as many in the backward
pass (PaLM, arXiv:2204.02311, appendix B). Embeddings, norms, activations and rotations are left
out; they are a few percent of a step, and grow with the same tokens and patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mrope.columns import Columns
from mrope.errors import MRopeError
from mrope.spec.class_defaults import CLASS_DEFAULTS, fill_defaults
from mrope.spec.model_config import read_int, read_model, read_tower

FloatArray = npt.NDArray[np.float64]
_Table = Columns

# transformers 5 writes the second for the first.
_EXPERTS = ("num_experts", "num_local_experts")

_FORWARD = 2  # a multiplication and an addition for each weight
_BOTH = 3 * _FORWARD  # the backward pass has products for the gradients of input and of weights
# Tokens of a chunk of linear attention, in flash-linear-attention and in transformers.
_CHUNK = 64
# Patches of an image where nobody says how many it has: 512 x 512 pixels with patches of 16.
_TYPICAL_IMAGE = 1024


@dataclass(frozen=True)
class WorkModel:
    """Estimate the work of examples in floating-point operations, forward and backward.

    A callable for `TokenBudgetSampler(cost=...)`; plain data. Work is a sum over examples, also in
    a flattened row, where no token attends to another example.

    Attributes:
        per_token: linear maps of the text model for a token: projections, MLP or the experts that
            a token is sent to, router, LM head. Layers of linear attention count in whole here.
        per_token_pair: scores and sums of attention for a token and one before it; an example of n
            tokens has n * n / 2 pairs.
        per_patch: linear maps of the vision tower for a patch, its share of the mergers included.
        per_patch_pair: the same as `per_token_pair` for two patches of one image or frame, in
            layers that attend over all of it; n patches have n * n pairs.
        per_window_pair: the same in layers that attend within windows.
        window: patches of a window; 0: no windows.

    Example:
        >>> work = WorkModel(
        ...     per_token=6e9, per_token_pair=4e5, per_patch=2e9, per_patch_pair=3e5)
        >>> f"{work.text([1000])[0]:.3g}, {work.tower([2048], [2 * 1024**2])[0]:.3g}"
        '6.2e+12, 4.73e+12'
        >>> print(work)
        WorkModel: 6 GFLOP a token, 0.0004 a pair of tokens, 2 a patch, 0.0003 a pair of patches
    """

    per_token: float
    per_token_pair: float
    per_patch: float
    per_patch_pair: float
    per_window_pair: float = 0.0
    window: int = 0

    @classmethod
    def from_config(cls, config: object, *, frozen_tower: bool = False) -> WorkModel:
        """Count the operations of a model from its config.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, or a live
                `PretrainedConfig`.
            frozen_tower: the tower is not trained: its forward pass alone is counted.

        Raises:
            MRopeError: not a config, a value is missing, or a family whose tower is not known.

        Not counted: audio towers, LoRA's small matrices, and what gradient checkpointing computes
        again, which scales text and tower alike.
        """
        name, table = read_model(config)
        text = table.get("text_config") or table
        count_tower = _TOWERS.get(str(name))
        if count_tower is None:
            raise MRopeError(
                f"WorkModel cannot count the vision tower of {name!r}; give the sampler a function "
                f"of tokens and patches instead. Known: {', '.join(_TOWERS)}"
            )
        # Without the section, the values at the top are those of an older file's text model.
        table = {"vision_config": {}, **table}
        vision, where = read_tower(table, "vision_config", name, str(name))
        text = fill_defaults(text, CLASS_DEFAULTS[str(name)]["text_config"])
        weights, pairs = _count_text(text, f"{name} text_config")
        tower = count_tower(vision, where)
        factor = _FORWARD if frozen_tower else _BOTH
        return cls(
            per_token=_BOTH * weights,
            per_token_pair=_BOTH * pairs,
            # Pixels need no gradient.
            per_patch=factor * tower.weights + min(factor, 2 * _FORWARD) * tower.embedding,
            per_patch_pair=factor * tower.pairs,
            per_window_pair=factor * tower.window_pairs,
            window=tower.window,
        )

    def __call__(
        self,
        tokens: npt.ArrayLike,
        patches: npt.ArrayLike,
        patch_pairs: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Return the work of each example, float64 (N,).

        Args:
            tokens: (N,) tokens of each example, placeholders included.
            patches: (N,) patches of each example.
            patch_pairs: (N,) sum of squared patches over its images and frames; None: as of images
                of 1,024 patches. Steps are balanced better with it: see the sampler's page.
        """
        return self.text(tokens) + self.tower(patches, patch_pairs)

    def text(self, tokens: npt.ArrayLike) -> FloatArray:
        """Return the text model's part of the work, float64 (N,)."""
        token_N = np.asarray(tokens, np.float64)
        work_N: FloatArray = token_N * (self.per_token + self.per_token_pair / 2 * token_N)
        return work_N

    def tower(self, patches: npt.ArrayLike, patch_pairs: npt.ArrayLike | None = None) -> FloatArray:
        """Return the vision tower's part of the work, float64 (N,)."""
        patch_N = np.asarray(patches, np.float64)
        pairs = patch_N * _TYPICAL_IMAGE if patch_pairs is None else patch_pairs
        pair_N = np.asarray(pairs, np.float64)
        # Windows at the edges of an image are smaller.
        windowed_N = np.minimum(patch_N * self.window, pair_N)
        work_N: FloatArray = (
            self.per_patch * patch_N
            + self.per_patch_pair * pair_N
            + self.per_window_pair * windowed_N
        )
        return work_N

    def __str__(self) -> str:
        counts = {
            "a token": self.per_token,
            "a pair of tokens": self.per_token_pair,
            "a patch": self.per_patch,
            "a pair of patches": self.per_patch_pair,
            f"a pair within a window of {self.window} patches": self.per_window_pair,
        }
        first, *others = (
            f"{value / 1e9:.3g}{{}} {name}" for name, value in counts.items() if value
        )
        listed = ", ".join((first.format(" GFLOP"), *(one.format("") for one in others)))
        return f"{type(self).__name__}: {listed}"


@dataclass(frozen=True)
class _Tower:
    """Multiplications of a vision tower's forward pass; see `WorkModel`."""

    embedding: int
    weights: float
    pairs: int
    window_pairs: int = 0
    window: int = 0


def _count_text(text: _Table, where: str) -> tuple[float, int]:
    """Return the multiplications of a text model for each token, and for each pair of tokens."""

    def number(*keys: str) -> int:
        return read_int(text, keys, where)

    hidden, layers, heads = (
        number(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    groups = text.get("num_key_value_heads") or heads
    width = heads * (text.get("head_dim") or hidden // heads)
    linear = _linear_layers(text, layers)
    # Where layers of both kinds alternate, attention has a gate as wide as the queries (Qwen3.5).
    queries = width * (2 if linear else 1)
    attention = hidden * (queries + 2 * width * groups // heads) + width * hidden
    weights = (layers - linear) * attention + hidden * number("vocab_size")
    if linear:
        weights += linear * _linear_attention(number, hidden)
    experts = sum(_has_experts(text, layer) for layer in range(layers))
    if experts:
        weights += experts * _expert_layer(text, number, hidden)
    if experts < layers:
        weights += (layers - experts) * 3 * hidden * number("intermediate_size")
    return weights, 2 * (layers - linear) * width


def _linear_layers(text: _Table, layers: int) -> int:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = text.get("full_attention_interval")
        # Qwen3.5's class has an interval of 4 where a config says neither.
        interval = interval or (4 if text.get("linear_num_value_heads") else 1)
        return layers - layers // int(interval)
    return sum(kind == "linear_attention" for kind in kinds)


def _linear_attention(number: Callable[..., int], hidden: int) -> int:
    """Return the multiplications of a gated delta rule for each token, in chunks."""
    heads, key = number("linear_num_value_heads"), number("linear_key_head_dim")
    value = number("linear_value_head_dim")
    key_width, value_width = number("linear_num_key_heads") * key, heads * value
    projections = hidden * (2 * key_width + 2 * value_width + 2 * heads) + value_width * hidden
    # Within a chunk keys meet keys, queries, and the inverse of that; values two of the three. The
    # state, key x value for each head, is read twice and written once.
    return projections + heads * (_CHUNK * (3 * key + 2 * value) + 3 * key * value)


def _has_experts(text: _Table, layer: int) -> bool:
    """Return whether a layer has experts, by the keys of Qwen's and GLM's classes."""
    if text.get("n_routed_experts"):
        return layer >= int(text.get("first_k_dense_replace", 1))
    if not any(text.get(key) for key in _EXPERTS):
        return False
    sparse = (layer + 1) % int(text.get("decoder_sparse_step") or 1) == 0
    return sparse and layer not in (text.get("mlp_only_layers") or ())


def _expert_layer(text: _Table, number: Callable[..., int], hidden: int) -> int:
    """Return the multiplications for each token of a router, and of the experts it is sent to."""
    inner = number("moe_intermediate_size")
    width = number("num_experts_per_tok") * inner
    width += int(text.get("shared_expert_intermediate_size") or 0)
    if text.get("n_routed_experts"):
        width += int(text.get("n_shared_experts", 1)) * inner
    return 3 * hidden * width + hidden * number(*_EXPERTS, "n_routed_experts")


def _count_tower(
    vision: _Table, where: str, *, width: int, mlp: int, mergers: int, layers: int
) -> _Tower:
    """Return the counts of a tower whose layers attend over whole frames.

    Args:
        width: of the tower.
        mlp: weights of a layer's MLP.
        mergers: weights of all mergers together.
        layers: of the tower.
    """
    patch, merge = (
        read_int(vision, (key,), where, 1) for key in ("patch_size", "spatial_merge_size")
    )
    channels = read_int(vision, ("in_channels", "in_chans"), where, 1)
    frames = read_int(vision, ("temporal_patch_size",), where, 1)
    return _Tower(
        embedding=channels * frames * patch**2 * width,
        weights=layers * (4 * width**2 + mlp) + mergers / merge**2,
        pairs=2 * layers * width,
    )


def _qwen2(vision: _Table, where: str) -> _Tower:
    width, out = (read_int(vision, (key,), where) for key in ("embed_dim", "hidden_size"))
    merged = width * read_int(vision, ("spatial_merge_size",), where) ** 2
    # A float in some configs, and 4 in all that were released.
    mlp = 2 * width * int(width * vision.get("mlp_ratio", 4))
    layers = read_int(vision, ("depth",), where)
    mergers = merged * (merged + out)
    return _count_tower(vision, where, width=width, mlp=mlp, mergers=mergers, layers=layers)


def _qwen3(vision: _Table, where: str, matrices: int = 2) -> _Tower:
    width, inner, out = (
        read_int(vision, (key,), where)
        for key in ("hidden_size", "intermediate_size", "out_hidden_size")
    )
    merged = width * read_int(vision, ("spatial_merge_size",), where) ** 2
    count = 1 + len(vision.get("deepstack_visual_indexes") or ())
    return _count_tower(
        vision,
        where,
        width=width,
        mlp=matrices * width * inner,
        mergers=count * merged * (merged + out),
        layers=read_int(vision, ("depth",), where),
    )


def _qwen2_5(vision: _Table, where: str) -> _Tower:
    tower = _qwen3(vision, where, matrices=3)
    whole = len(vision.get("fullatt_block_indexes") or ())
    layers = read_int(vision, ("depth",), where, 1)
    window, patch = (read_int(vision, (key,), where, 1) for key in ("window_size", "patch_size"))
    pairs = tower.pairs // layers
    return _Tower(
        tower.embedding,
        tower.weights,
        pairs=pairs * whole,
        window_pairs=pairs * (layers - whole),
        window=(window // patch) ** 2,
    )


def _glm(vision: _Table, where: str) -> _Tower:
    width, inner, out = (
        read_int(vision, (key,), where)
        for key in ("hidden_size", "intermediate_size", "out_hidden_size")
    )
    merged = width * read_int(vision, ("spatial_merge_size",), where) ** 2
    return _count_tower(
        vision,
        where,
        width=width,
        mlp=3 * width * out,
        mergers=merged * out + out * out + 3 * out * inner,
        layers=read_int(vision, ("depth",), where),
    )


_TOWERS: Mapping[str, Callable[[_Table, str], _Tower]] = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "qwen3_5": _qwen3,
    "qwen3_5_moe": _qwen3,
    "glm4v": _glm,
    "glm46v": _glm,
    "glm4v_moe": _glm,
}
