"""Random batches for the Omni thinkers, and a slow twin of their rule: one token after another."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from mrope import MRopeSpec

VISION_END_ID, AUDIO_END_ID = 98, 97
_SECONDS = [0.04, 1 / 3, 0.37, 0.5, 0.8, 1.0, 2.0, 2.7]

Point = tuple[Any, Any, Any]


def random_omni_batch(rng: random.Random, spec: MRopeSpec) -> dict[str, Any]:
    """Return arguments for `rope_index`: images, videos, audio, and audio in every video or none."""
    batch: dict[str, Any] = {
        "image_grid_thw": [],
        "video_grid_thw": [],
        "second_per_grid_ts": [],
        "audio_seqlens": [],
        "use_audio_in_video": rng.random() < 0.5,
    }
    rows = [_random_row(rng, spec, batch) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
    width = max(map(len, rows)) + rng.choice([0, 0, 3])
    left = rng.random() < 0.5
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[index, where], mask[index, where] = row, 1
    arrays = {
        name: np.array(values, np.float32 if name == "second_per_grid_ts" else np.int64)
        for name, values in batch.items()
        if isinstance(values, list) and values
    }
    absent = {name: None for name, values in batch.items() if values == []}
    return {"input_ids": ids, "attention_mask": mask, **batch, **absent, **arrays}


def _random_row(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    row: list[int] = []
    for _ in range(rng.choice([0, 1, 2, 4])):
        row += rng.choices(range(1, 50), k=rng.choice([0, 0, 1, 3]))
        row += rng.choice([_image, _video, _audio])(rng, spec, batch)
    return row + rng.choices(range(1, 50), k=rng.choice([0, 1, 4]) if row else 3)


def _image(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    tokens = _grid(rng, spec, batch["image_grid_thw"], [1, 1, 1, 2])
    return [spec.vision_start_token_id, *[spec.image_token_id] * tokens, VISION_END_ID]


def _audio(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    batch["audio_seqlens"].append(rng.choice([rng.randrange(4, 60), 100, 101, rng.randrange(900)]))
    batch["audio_seqlens"][-1] = max(batch["audio_seqlens"][-1], 4)
    tokens = slow_audio_tokens(spec, batch["audio_seqlens"][-1])
    start, token = spec.extra["audio_start_token_id"], spec.extra["audio_token_id"]
    return [int(start), *[int(token)] * tokens, AUDIO_END_ID]


def _video(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    batch["second_per_grid_ts"].append(rng.choice(_SECONDS))
    tokens = _grid(rng, spec, batch["video_grid_thw"], [1, 2, 3, 6, 13])
    start, video = spec.vision_start_token_id, spec.video_token_id
    if not batch["use_audio_in_video"]:
        return [start, *[video] * tokens, VISION_END_ID]
    audio_start, *audio, audio_end = _audio(rng, spec, batch)
    # The rule looks at the first placeholder alone, and puts the others in an order of its own.
    rest = [video] * (tokens - 1) + audio
    rng.shuffle(rest)
    return [start, audio_start, video, *rest, audio_end, VISION_END_ID]


def _grid(rng: random.Random, spec: MRopeSpec, grids: list[list[int]], frames: list[int]) -> int:
    merge = spec.spatial_merge_size
    t, h, w = rng.choice(frames), rng.choice([1, 2, 3]), rng.choice([1, 2, 5])
    grids.append([t, h * merge, w * merge])
    return t * h * w


def slow_audio_tokens(spec: MRopeSpec, mel: int) -> int:
    """Return the tokens of an audio: two strided convolutions, window by window in Qwen3-Omni."""
    if spec.family == "qwen2_5_omni_thinker":
        return ((mel - 1) // 2 + 1 - 2) // 2 + 1
    tokens = mel // 100 * 13
    rest = (mel % 100 - 1) // 2 + 1
    rest = (rest - 1) // 2 + 1
    return tokens + (rest - 1) // 2 + 1


def slow_omni_index(spec: MRopeSpec, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return what `rope_index` must return for arguments of `random_omni_batch`."""
    old = spec.family == "qwen2_5_omni_thinker"
    kind: Any = np.int64 if old else np.float32
    ids, mask = batch["input_ids"], batch["attention_mask"]
    media = batch["image_grid_thw"] is not None or batch["video_grid_thw"] is not None
    positions = np.full((3, *ids.shape), 0 if media and not old else 1, kind)
    deltas = np.zeros((len(ids), 1), kind)
    sizes = {name: list(batch[name]) if batch[name] is not None else [] for name in _SIZES}
    for row, (tokens, valid) in enumerate(zip(ids, mask, strict=True)):
        places = np.flatnonzero(valid)
        points = _Walk(spec, kind, sizes, [int(token) for token in tokens[places]]).points()
        for place, point in zip(places, points, strict=True):
            positions[:, row, place] = point
        top = max((max(point) for point in points), default=kind(-1))
        if not media and len(places) < len(tokens):
            top = max(top, kind(1))
        deltas[row, 0] = kind(top + kind(1)) - kind(len(places))
    assert not any(sizes.values())
    return positions, deltas


_SIZES = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "audio_seqlens")


class _Walk:
    """One row, token by token: `out` is what is numbered, `base` the next position."""

    def __init__(
        self, spec: MRopeSpec, kind: Any, sizes: dict[str, list[Any]], tokens: list[int]
    ) -> None:
        self.spec, self.kind, self.sizes, self.tokens = spec, kind, sizes, tokens
        self.old = spec.family == "qwen2_5_omni_thinker"
        self.out: list[Point] = []
        self.base: Any = kind(0)

    def points(self) -> list[Point]:
        vision, audio = self.spec.vision_start_token_id, self.spec.extra["audio_start_token_id"]
        while len(self.out) < len(self.tokens):
            behind = self.tokens[len(self.out) + 1 : len(self.out) + 2]
            now = self.tokens[len(self.out)]
            if now == vision and behind == [audio]:
                self.span(2, self.merged)
            elif now == vision:
                image = behind == [self.spec.image_token_id]
                self.span(1, lambda image=image: self.last(self.frames(image)))
            elif now == audio:
                self.span(1, lambda: self.last(self.audio()))
            else:
                self.run(1)
        return self.out

    def run(self, count: int) -> None:
        """Text: the base moves on once for a whole run, which matters to float32 only."""
        end = len(self.out) + count
        starts = (self.spec.vision_start_token_id, self.spec.extra["audio_start_token_id"])
        while end < len(self.tokens) and self.tokens[end] not in starts:
            end += 1
        length = end - len(self.out)
        for step in range(length):
            self.out.append((self.kind(self.kind(step) + self.base),) * 3)
        self.base = self.kind(self.base + self.kind(length))

    def markers(self, count: int) -> None:
        for step in range(count):
            shift = 0 if self.old else step
            self.out.append((self.kind(self.kind(shift) + self.base),) * 3)
        self.base = self.kind(self.base + self.kind(1 if self.old else count))

    def span(self, count: int, block: Any) -> None:
        self.markers(count)
        block()
        self.markers(count)
        # What follows stands behind the largest so far, not behind the sum.
        self.base = self.kind(max(self.out[-1]) + self.kind(1))

    def last(self, piece: list[Point]) -> None:
        self.out += piece
        self.base = self.kind(max(max(point) for point in piece) + self.kind(1))

    def audio(self) -> list[Point]:
        tokens = slow_audio_tokens(self.spec, int(self.sizes["audio_seqlens"].pop(0)))
        return [(self.kind(self.kind(step) + self.base),) * 3 for step in range(tokens)]

    def frames(self, image: bool) -> list[Point]:
        t, h, w = self.sizes["image_grid_thw" if image else "video_grid_thw"].pop(0)
        seconds = np.float32(1) if image else self.sizes["second_per_grid_ts"].pop(0)
        merge, points = self.spec.spatial_merge_size, []
        for frame in range(t):
            time = np.float32(np.float32(frame) * np.float32(seconds)) * np.float32(25)
            for y in range(h // merge):
                for x in range(w // merge):
                    point = (self.kind(time), self.kind(y), self.kind(x))
                    points.append(tuple(self.kind(part + self.base) for part in point))
        return points

    def merged(self) -> None:
        streams = [self.frames(image=False), self.audio()]
        pieces = self.in_chunks(*streams) if self.old else self.by_time(*streams)
        for piece in pieces[:-1]:
            self.out += piece
        self.last(pieces[-1])

    def in_chunks(self, video: list[Point], audio: list[Point]) -> list[list[Point]]:
        start, size = self.base, 25 * 2
        chunked = []
        for stream in (video, audio):
            chunks: list[list[Point]] = [[]]
            for point in stream:
                if point[0] - start >= len(chunks) * size:
                    chunks.append([])
                chunks[-1].append(point)
            chunked.append(chunks)
        longest = max(map(len, chunked))
        return [c[j] for j in range(longest) for c in chunked if j < len(c)]

    def by_time(self, video: list[Point], audio: list[Point]) -> list[list[Point]]:
        pieces = []
        while video and audio:
            earlier = video if video[0][0] <= audio[0][0] else audio
            pieces.append([earlier.pop(0)])
        return [*pieces, video or audio]
