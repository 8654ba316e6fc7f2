"""Compute the index tensors of an Omni's audio tower from the lengths of the audios.

All tensors are functions of the mel frames of each audio and of a few values of the config. The
towers cut each audio into chunks of `2 * n_window` frames, run their convolutions over a padded
batch of chunks, and drop the outputs at padding.

Source: `chunk_and_pad_features`, `get_valid_indices`, `get_pool_indices` and `get_audio_cu_seqlens`
of `qwen2_5_omni` and `qwen3_omni_moe`, transformers 5.23.

Shape suffixes: N audios, C chunks of all audios, W attention windows, K tokens of all chunks
between the convolutions and the pooling.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mrope.arrays import Array, as_integers, borders, starts, within
from mrope.columns import Columns, columns
from mrope.errors import MRopeError
from mrope.spec.model_config import read_int, read_model, read_tower
from mrope.spec.references import TOWERS_READ_SINCE, as_release, installed_transformers

if TYPE_CHECKING:
    import torch

Int64Array = npt.NDArray[np.int64]

_LENGTHS = next(columns("item", modality="audio", means="size"))
# Qwen3-Omni's code has this constant for every `n_window`; it is right for 50, the released value.
_TOKENS_OF_FULL_CHUNK = 13
# Families with an audio tower, and whether the tower averages pairs of tokens at its end.
_POOLS = {"qwen2_5_omni": True, "qwen3_omni_moe": False}


@dataclass(frozen=True)
class AudioSpec:
    """Values of an audio tower that its tensors depend on: plain data, picklable, comparable.

    Attributes:
        n_window: half of a chunk, in mel frames.
        chunks_attended: full chunks in one attention window (Qwen3-Omni); None: each chunk is a
            window of its own, and pairs of tokens are averaged at the end (Qwen2.5-Omni).
    """

    n_window: int
    chunks_attended: int | None = None

    @classmethod
    def from_config(cls, config: Columns | str | os.PathLike[str] | Any) -> AudioSpec:
        """Read a spec from the config of an Omni or of its thinker, or from its `audio_config`.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, or a live
                `PretrainedConfig`. `model_type` may be the model's or the tower's.

        Raises:
            MRopeError: not a config, a `model_type` without a known audio tower, a key that is
                missing or of the wrong type, an attention window smaller than a chunk.

        Example:
            >>> AudioSpec.from_config({
            ...     "model_type": "qwen3_omni_moe_thinker",
            ...     "audio_config": {"n_window": 50, "n_window_infer": 800},
            ... })
            AudioSpec(n_window=50, chunks_attended=8)
        """
        name, table = read_model(config)
        plain = str(name).removesuffix("_audio_encoder").removesuffix("_thinker")
        if plain not in _POOLS:
            raise MRopeError(
                f"model_type {name!r} has no audio tower whose tensors mrope computes; "
                f"known: {', '.join(_POOLS)}"
            )
        audio, where = read_tower(table, "audio_config", name, f"{plain}_thinker")
        n_window = read_int(audio, ("n_window",), where, 1)
        if _POOLS[plain]:
            return cls(n_window)
        window = read_int(audio, ("n_window_infer",), where, 2 * n_window)
        return cls(n_window, window // n_window // 2)

    def check_release(self, version: str | None = None) -> None:
        """Refuse a transformers release whose audio towers take none of `keys`.

        Args:
            version: release to check; None: the installed one. If none is installed, nothing
                is checked.

        Raises:
            MRopeError: the release is too old.
        """
        version = version if version is not None else installed_transformers()
        if version is not None and as_release(version) < TOWERS_READ_SINCE:
            raise MRopeError(
                f"transformers {version} does not read audio tensors; install "
                f"{TOWERS_READ_SINCE[0]}.{TOWERS_READ_SINCE[1]} or later, or leave audio out"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tower's tensors, without the prefix `audio_`.

        The tower reads `chunk_lengths` only together with `padded_feature`: see `padded_features`.
        """
        pooled = ("pool_indices",) if self.chunks_attended is None else ()
        return ("cu_seqlens", "max_seqlen", "valid_indices", "chunk_lengths", *pooled)


def audio_tensors(spec: AudioSpec, audio_seqlens: npt.ArrayLike | None) -> dict[str, Array | int]:
    """Compute every input of an audio tower beside its features.

    Args:
        spec: the tower's values.
        audio_seqlens: (N,) integers: mel frames of each audio, as `feature_attention_mask` counts
            them. None or empty: no tensors, as the model does not call the tower either.

    Returns:
        The tensors under the tower's own names, `spec.keys`; empty without audios.

        - `chunk_lengths` int64 (C,): mel frames of each chunk; an audio's last may be shorter.
        - `valid_indices` int64 (K,): indices of tokens that are not padding in the flattened batch
          of chunks, each padded to the longest.
        - `cu_seqlens` int32 (W + 1,), `max_seqlen` int: attention windows, as offsets into the K
          tokens; a window never spans two audios.
        - `pool_indices` int64 (pairs,): first token of each pair that is averaged; an audio's odd
          last token is dropped. Qwen2.5-Omni only.

    Raises:
        MRopeError: lengths that are not a flat list of integers of at least 1.

    Example:
        An audio of 9 frames is cut into chunks of 8 and 1, which become 4 tokens and 1:

        >>> tensors = audio_tensors(AudioSpec(n_window=4), [9])
        >>> {name: getattr(tensors[name], "tolist", int)() for name in AudioSpec(4).keys[2:]}
        {'valid_indices': [0, 1, 2, 3, 4], 'chunk_lengths': [8, 1], 'pool_indices': [0, 2]}
    """
    frames_N = _as_lengths(audio_seqlens)
    if not len(frames_N):
        return {}
    chunk_C = chunk_lengths(spec, frames_N)
    tokens_C = _convolved(spec, chunk_C)
    windows_W = tokens_C if spec.chunks_attended is None else _windows(spec, frames_N, tokens_C)
    tensors: dict[str, Array | int] = {
        "cu_seqlens": borders(windows_W, np.int32),
        "max_seqlen": int(windows_W.max()),
        "valid_indices": valid_indices(tokens_C),
        "chunk_lengths": chunk_C,
    }
    if spec.chunks_attended is None:
        tensors["pool_indices"] = pool_indices(_convolved(spec, frames_N))
    return tensors


def audio_tokens(spec: AudioSpec, frames_N: Int64Array) -> Int64Array:
    """Compute the placeholder tokens of each audio from its mel frames, both int64 (N,).

    Example:
        >>> audio_tokens(AudioSpec(100), np.array([95, 200])).tolist()
        [24, 50]
    """
    tokens_N = _convolved(spec, frames_N)
    # Averaging drops an odd last token.
    return tokens_N // 2 if spec.chunks_attended is None else tokens_N


def padded_features(
    spec: AudioSpec, input_features: torch.Tensor, audio_seqlens: npt.ArrayLike
) -> torch.Tensor:
    """Cut features into chunks: the tower's `padded_feature`, for use with `chunk_lengths`.

    Args:
        spec: the tower's values.
        input_features: (N, mel bins, frames) from a processor, padded on the right.
        audio_seqlens: (N,) frames of each audio that are not padding.

    Returns:
        (C, mel bins, longest chunk) in the features' dtype, 0 at padding.

    Raises:
        MRopeError: lengths that are not integers of at least 1, or that do not fit the features.
    """
    import torch
    from torch.nn.functional import pad

    frames_N = _as_lengths(audio_seqlens)
    audios, _, width = input_features.shape
    if frames_N.shape != (audios,) or frames_N.max(initial=0) > width:
        raise MRopeError(
            f"{_LENGTHS} {frames_N.tolist()} do not fit input_features of shape "
            f"{tuple(input_features.shape)}: (audios, mel bins, frames)"
        )
    size = 2 * spec.n_window
    # Views of equal chunks; those that hold padding only are dropped below.
    whole = pad(input_features, (0, -width % size)).unfold(2, size, size).permute(0, 2, 1, 3)
    chunks_N = -(-frames_N // size)
    used = torch.from_numpy(np.arange(whole.shape[1]) < chunks_N[:, None])
    chunk_C = torch.from_numpy(chunk_lengths(spec, frames_N))
    longest = int(chunk_C.max()) if audios else 0
    chunks = whole[used][..., :longest]
    # Same memory layout as the tower's own chunks, since the convolution rounds by layout.
    frames = chunks.transpose(1, 2).contiguous()
    frames[torch.arange(longest) >= chunk_C[:, None]] = 0
    return frames.transpose(1, 2)


def chunk_lengths(spec: AudioSpec, frames_N: Int64Array) -> Int64Array:
    """Compute the mel frames of each chunk, int64 (C,).

    Example:
        >>> chunk_lengths(AudioSpec(n_window=50), np.array([250, 100])).tolist()
        [100, 100, 50, 100]
    """
    size = 2 * spec.n_window
    chunks_N = -(-frames_N // size)
    chunk_C = np.full(chunks_N.sum(), size, np.int64)
    # Only the last chunk of each audio can be shorter.
    chunk_C[chunks_N.cumsum() - 1] = frames_N - size * (chunks_N - 1)
    return chunk_C


def valid_indices(tokens_C: Int64Array) -> Int64Array:
    """Compute flat indices of the tokens of chunks that are padded to the longest, int64 (K,).

    Example:
        >>> valid_indices(np.array([3, 1, 2])).tolist()
        [0, 1, 2, 3, 6, 7]
    """
    longest = int(tokens_C.max())
    place_C = np.arange(len(tokens_C)) * longest
    indices: Int64Array = place_C.repeat(tokens_C) + within(tokens_C)
    return indices


def pool_indices(tokens_N: Int64Array) -> Int64Array:
    """Compute the first token of each pair that is averaged, int64 (pairs,).

    Example:
        Audios of 5 and 2 tokens; the fifth token has no partner and is dropped:

        >>> pool_indices(np.array([5, 2])).tolist()
        [0, 2, 5]
    """
    pairs_N = tokens_N // 2
    indices: Int64Array = starts(tokens_N).repeat(pairs_N) + 2 * within(pairs_N)
    return indices


def _convolved(spec: AudioSpec, frames_N: Int64Array) -> Int64Array:
    """Compute the tokens after the convolutions: each strided one halves the length, rounding up.

    Qwen2.5-Omni has one strided convolution, Qwen3-Omni three, which run on each chunk separately.
    """
    if spec.chunks_attended is None:
        return (frames_N + 1) // 2
    whole_N, rest_N = np.divmod(frames_N, 2 * spec.n_window)
    tokens: Int64Array = whole_N * _TOKENS_OF_FULL_CHUNK + -(-rest_N // 8)
    return tokens


def _windows(spec: AudioSpec, frames_N: Int64Array, tokens_C: Int64Array) -> Int64Array:
    """Compute the tokens of each attention window, int64 (W,): full windows, then the remainder."""
    assert spec.chunks_attended is not None  # checked by the caller
    # transformers multiplies the longest chunk of this batch, not the nominal chunk length.
    window = int(tokens_C.max()) * spec.chunks_attended
    tokens_N = _convolved(spec, frames_N)
    windows_N = -(-tokens_N // window)
    windows_W = np.full(windows_N.sum(), window, np.int64)
    windows_W[windows_N.cumsum() - 1] = tokens_N - window * (windows_N - 1)
    return windows_W


def _as_lengths(audio_seqlens: npt.ArrayLike | None) -> Int64Array:
    lengths = as_integers(
        _LENGTHS, [] if audio_seqlens is None else audio_seqlens, "mel frames of each audio"
    )
    if lengths.ndim != 1:
        raise MRopeError(f"{_LENGTHS} must have shape (audios,), not {lengths.shape}")
    if (lengths < 1).any():
        audio = int((lengths < 1).argmax())
        raise MRopeError(f"{_LENGTHS}[{audio}] = {lengths[audio]}: must be at least 1")
    return lengths.astype(np.int64)
