"""What an Omni's audio tower would compute from its audios' lengths, computed in the worker.

The twin of `mrope.towers.vision`: everything here is a function of the mel frames of each audio and of a
few numbers of the config. The towers cut each audio into chunks of `2 * n_window` frames, run their
convolutions over all chunks side by side, and drop what only padding made.

Source: `chunk_and_pad_features`, `get_valid_indices`, `get_pool_indices` and `get_audio_cu_seqlens`
of `qwen2_5_omni` and `qwen3_omni_moe`, transformers 5.23.

Shape suffixes: N audios, C chunks of all audios, W attention windows, K tokens of all chunks
between the convolutions and the pooling.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mrope.arrays import as_integers
from mrope.errors import MRopeError
from mrope.spec.model_config import as_mapping, model_section, read_int
from mrope.spec.references import as_release, installed_transformers

if TYPE_CHECKING:
    import torch

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

READ_SINCE = (5, 23)
"""The transformers release (major, minor) whose audio towers are known to read every tensor."""

_TOKENS_OF_FULL_CHUNK = 13
"""What Qwen3-Omni counts for a full chunk, whatever `n_window` is; right for its own, 50."""

_POOLS = {"qwen2_5_omni": True, "qwen3_omni_moe": False}
"""The families with an audio tower: whether it averages pairs of tokens at its end."""


@dataclass(frozen=True)
class AudioSpec:
    """The numbers of an audio tower: plain data, picklable, comparable.

    Attributes:
        n_window: half of a chunk, in mel frames.
        chunks_attended: full chunks that attend to one another (Qwen3-Omni); None: each chunk
            attends to itself alone, and pairs of tokens are averaged at the end (Qwen2.5-Omni).
    """

    n_window: int
    chunks_attended: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str] | Any) -> AudioSpec:
        """Read a spec from the config of an Omni or of its thinker, or from its `audio_config`.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, or a live
                `PretrainedConfig`. Its `model_type` may be the model's or the tower's.

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
        name, table = model_section(as_mapping(config))
        plain = str(name).removesuffix("_audio_encoder").removesuffix("_thinker")
        if plain not in _POOLS:
            raise MRopeError(
                f"model_type {name!r} has no audio tower whose tensors mrope computes; "
                f"known: {', '.join(_POOLS)}"
            )
        audio = table.get("audio_config", table)
        if not isinstance(audio, Mapping):
            raise MRopeError(f"{name}: audio_config must be a section, not {audio!r}")
        where = f"{name} audio_config"
        n_window = read_int(audio, ("n_window",), where, 1)
        if _POOLS[plain]:
            return cls(n_window)
        return cls(
            n_window, read_int(audio, ("n_window_infer",), where, 2 * n_window) // n_window // 2
        )

    def check_release(self, version: str | None = None) -> None:
        """Refuse a transformers whose audio towers would not read what `audio_tensors` computes.

        Args:
            version: release to check; None: the installed one, if there is one.

        Raises:
            MRopeError: the release is too old.
        """
        version = version if version is not None else installed_transformers()
        if version is not None and as_release(version) < READ_SINCE:
            raise MRopeError(
                f"transformers {version} does not read all audio tensors; install "
                f"{READ_SINCE[0]}.{READ_SINCE[1]} or later, or leave audio out"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Names under which the tower takes its tensors, without `audio_`.

        `chunk_lengths` is taken only together with `padded_feature`: see `padded_features`.
        """
        pooled = ("pool_indices",) if self.chunks_attended is None else ()
        return ("cu_seqlens", "max_seqlen", "valid_indices", "chunk_lengths", *pooled)


def audio_tensors(
    spec: AudioSpec, audio_seqlens: npt.ArrayLike | None
) -> dict[str, npt.NDArray[Any] | int]:
    """Compute all that an audio tower takes beside its features, from the audios' lengths alone.

    Args:
        spec: the tower's numbers.
        audio_seqlens: (N,) integers: mel frames of each audio, as `feature_attention_mask` counts
            them. None or none: there is nothing to compute, and the tower is not called either.

    Returns:
        The tensors under the tower's own names, `spec.keys`; empty where there are no audios.

        - `chunk_lengths` int64 (C,): mel frames of each chunk; an audio's last may be shorter.
        - `valid_indices` int64 (K,): which tokens are of an audio, among those of all chunks as
          they stand side by side, each padded to the longest.
        - `cu_seqlens` int32 (W + 1,), `max_seqlen` int: the tokens that attend to one another; at
          every border another chunk, another window of chunks, or another audio begins.
        - `pool_indices` int64: the first of each pair of tokens that is averaged; an audio's odd
          last one is dropped. Qwen2.5-Omni only.

    Raises:
        MRopeError: lengths that are not integers of at least 1.

    Example:
        An audio of 9 frames, in chunks of 8 and 1 that become 4 tokens and 1:

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
    tensors: dict[str, npt.NDArray[Any] | int] = {
        "cu_seqlens": _borders(windows_W),
        "max_seqlen": int(windows_W.max()),
        "valid_indices": valid_indices(tokens_C),
        "chunk_lengths": chunk_C,
    }
    if spec.chunks_attended is None:
        tensors["pool_indices"] = pool_indices(_convolved(spec, frames_N))
    return tensors


def audio_tokens(spec: AudioSpec, frames_N: Int64Array) -> Int64Array:
    """Return how many tokens each audio has in the text: what the tower makes of its mel frames.

    Example:
        >>> audio_tokens(AudioSpec(100), np.array([95, 200])).tolist()
        [24, 50]
    """
    tokens_N = _convolved(spec, frames_N)
    return tokens_N // 2 if spec.chunks_attended is None else tokens_N


def padded_features(
    spec: AudioSpec, input_features: torch.Tensor, audio_seqlens: npt.ArrayLike
) -> torch.Tensor:
    """Cut features into the tower's chunks: `padded_feature`, taken together with `chunk_lengths`.

    Args:
        spec: the tower's numbers.
        input_features: (N, mel bins, frames) as processors give them, padded on the right.
        audio_seqlens: (N,) frames of each audio that are not padding.

    Returns:
        (C, mel bins, longest chunk) of the features' dtype, zero behind each chunk's end.

    Raises:
        MRopeError: lengths that are no integers of at least 1, or that do not fit the features.
    """
    import torch
    from torch.nn.functional import pad

    frames_N = _as_lengths(audio_seqlens)
    audios, _, width = input_features.shape
    if frames_N.shape != (audios,) or frames_N.max(initial=0) > width:
        raise MRopeError(
            f"audio_seqlens {frames_N.tolist()} do not fit input_features of shape "
            f"{tuple(input_features.shape)}: (audios, mel bins, frames)"
        )
    size = 2 * spec.n_window
    whole = pad(input_features, (0, -width % size)).unfold(2, size, size).permute(0, 2, 1, 3)
    chunks_N = -(-frames_N // size)
    used = torch.from_numpy(np.arange(whole.shape[1]) < chunks_N[:, None])
    chunk_C = torch.from_numpy(chunk_lengths(spec, frames_N))
    longest = int(chunk_C.max()) if audios else 0
    chunks = whole[used][..., :longest]
    # In the tower's own layout, frame by frame in memory: its convolution rounds by the layout.
    frames = chunks.transpose(1, 2).contiguous()
    frames[torch.arange(longest) >= chunk_C[:, None]] = 0
    return frames.transpose(1, 2)


def chunk_lengths(spec: AudioSpec, frames_N: Int64Array) -> Int64Array:
    """Return the mel frames of each chunk, int64 (C,).

    Example:
        >>> chunk_lengths(AudioSpec(n_window=50), np.array([250, 100])).tolist()
        [100, 100, 50, 100]
    """
    size = 2 * spec.n_window
    chunks_N = -(-frames_N // size)
    chunk_C = np.full(chunks_N.sum(), size, np.int64)
    chunk_C[chunks_N.cumsum() - 1] = frames_N - size * (chunks_N - 1)
    return chunk_C


def valid_indices(tokens_C: Int64Array) -> Int64Array:
    """Return where chunks' tokens stand, each chunk padded to the longest, int64 (K,).

    Example:
        >>> valid_indices(np.array([3, 1, 2])).tolist()
        [0, 1, 2, 3, 6, 7]
    """
    longest = int(tokens_C.max())
    place_C = np.arange(len(tokens_C)) * longest
    indices: Int64Array = place_C.repeat(tokens_C) + _count_within(tokens_C)
    return indices


def pool_indices(tokens_N: Int64Array) -> Int64Array:
    """Return the first token of each pair that is averaged, int64.

    Example:
        Audios of 5 and 2 tokens: the fifth has no partner.

        >>> pool_indices(np.array([5, 2])).tolist()
        [0, 2, 5]
    """
    pairs_N = tokens_N // 2
    start_N = tokens_N.cumsum() - tokens_N
    indices: Int64Array = start_N.repeat(pairs_N) + 2 * _count_within(pairs_N)
    return indices


def _convolved(spec: AudioSpec, frames_N: Int64Array) -> Int64Array:
    """Return the tokens that stretches of mel frames become: every convolution halves, rounded up.

    Qwen2.5-Omni has one that does, Qwen3-Omni three; those start anew with every chunk.
    """
    if spec.chunks_attended is None:
        return (frames_N + 1) // 2
    whole_N, rest_N = np.divmod(frames_N, 2 * spec.n_window)
    tokens: Int64Array = whole_N * _TOKENS_OF_FULL_CHUNK + -(-rest_N // 8)
    return tokens


def _windows(spec: AudioSpec, frames_N: Int64Array, tokens_C: Int64Array) -> Int64Array:
    """Return the tokens of each attention window: an audio's full windows, then what is left."""
    assert spec.chunks_attended is not None  # the caller asked
    # The reference's window is as many times the longest chunk that this very batch has.
    window = int(tokens_C.max()) * spec.chunks_attended
    tokens_N = _convolved(spec, frames_N)
    windows_N = -(-tokens_N // window)
    windows_W = np.full(windows_N.sum(), window, np.int64)
    windows_W[windows_N.cumsum() - 1] = tokens_N - window * (windows_N - 1)
    return windows_W


def _count_within(counts: Int64Array) -> Int64Array:
    """Return 0, 1, ... for each group: counts [3, 0, 2] give [0, 1, 2, 0, 1]."""
    within: Int64Array = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)
    return within


def _borders(lengths: Int64Array) -> Int32Array:
    borders = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=borders[1:], dtype=np.int32)
    return borders


def _as_lengths(audio_seqlens: npt.ArrayLike | None) -> Int64Array:
    lengths = as_integers(
        "audio_seqlens", [] if audio_seqlens is None else audio_seqlens, "mel frames of each audio"
    )
    if lengths.ndim != 1:
        raise MRopeError(f"audio_seqlens must have shape (audios,), not {lengths.shape}")
    if (lengths < 1).any():
        audio = int((lengths < 1).argmax())
        raise MRopeError(f"audio_seqlens[{audio}] = {lengths[audio]}: must be at least 1")
    return lengths.astype(np.int64)
