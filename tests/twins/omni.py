"""Random batches for the Omni thinkers, and their rules as plain Python: one token after another.

Written from the rules alone. Placeholders of a video with audio stand as transformers' processors
write them, whose times are float64 and count from 0; the rules' are float32, in Qwen3-Omni on top
of what stands before. So the two do not always agree where a frame begins, and need not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mrope import MRopeSpec

FAMILIES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
VISION_END, AUDIO_END, PAD = 98, 97, 0
TEXT = range(1, 50)
SECONDS = (0.04, 2 / 15, 0.25, 1 / 3, 0.4, 0.5, 0.7, 0.8, 1.0, 1.5, 2.0, 2.7, 4.0, 9.0)

Point = tuple[Any, Any, Any]


def is_old(spec: MRopeSpec) -> bool:
    return spec.family.startswith("qwen2_5_omni")


@dataclass
class Maker:
    """A batch under construction: rows of tokens, and sizes in the order of the batch."""

    rng: random.Random
    spec: MRopeSpec
    together: bool
    rows: list[list[int]] = field(default_factory=list)
    images: list[list[int]] = field(default_factory=list)
    videos: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    audios: list[int] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)

    def add_row(self, kinds: list[str]) -> None:
        row: list[int] = []
        before = len(self.images), len(self.videos), len(self.audios)
        for kind in kinds:
            row += (
                self.text(0, 0, 1, 3) + {"i": self.image, "v": self.video, "a": self.audio}[kind]()
            )
        self.rows.append(row + (self.text(0, 1, 4) if row else self.text(1, 2, 9)))
        after = len(self.images), len(self.videos), len(self.audios)
        self.counts.append([late - early for late, early in zip(after, before, strict=True)])

    def text(self, *lengths: int) -> list[int]:
        return self.rng.choices(TEXT, k=self.rng.choice(lengths))

    def image(self) -> list[int]:
        tokens = self.grid(self.images, 1, 1, 1, 2)
        return [self.spec.vision_start_token_id, *[self.spec.image_token_id] * tokens, VISION_END]

    def audio(self) -> list[int]:
        mel = self.rng.choice(
            [self.rng.randrange(3, 60), self.rng.randrange(3, 900), 100, 200, 201]
        )
        self.audios.append(mel)
        start, token = (
            int(self.spec.extra[f"audio_{name}id"]) for name in ("start_token_", "token_")
        )
        return [start, *[token] * audio_length(self.spec, mel), AUDIO_END]

    def video(self) -> list[int]:
        tokens = self.grid(self.videos, 1, 2, 3, 6, 14)
        self.seconds.append(self.rng.choice(SECONDS))
        start, token = self.spec.vision_start_token_id, self.spec.video_token_id
        if not self.together:
            return [start, *[token] * tokens, VISION_END]
        audio_start, *audio, audio_end = self.audio()
        frames = self.videos[-1][0]
        rate = self.spec.extra["position_id_per_seconds"]
        times = [
            f * self.seconds[-1] * rate for f in range(frames) for _ in range(tokens // frames)
        ]
        video_of = [(time, token) for time in times]
        audio_of = [(float(k), audio[0]) for k in range(len(audio))]
        mixed = mix(self.spec, video_of, audio_of)
        return [start, audio_start, *(token for _, token in mixed), audio_end, VISION_END]

    def grid(self, grids: list[list[int]], *frames: int) -> int:
        t, h, w = (self.rng.choice(sizes) for sizes in (frames, (1, 1, 2, 4), (1, 2, 5)))
        merge = self.spec.spatial_merge_size
        grids.append([t, h * merge, w * merge])
        return t * h * w

    def batch(self, padding: str, masked: bool) -> dict[str, Any]:
        longest = max(map(len, self.rows))
        if padding == "none":
            self.rows = [row + self.rng.choices(TEXT, k=longest - len(row)) for row in self.rows]
        width = longest + (self.rng.randrange(4) if padding != "none" else 0)
        ids, mask = np.full((2, len(self.rows), width), PAD, np.int64)
        mask[:] = 0
        for index, row in enumerate(self.rows):
            where = {"left": range(width - len(row), width), "right": range(len(row))}.get(
                padding, sorted(self.rng.sample(range(width), len(row)))
            )
            ids[index, list(where)], mask[index, list(where)] = row, 1
        return {
            "input_ids": ids,
            "attention_mask": mask if masked or padding != "none" else None,
            "image_grid_thw": np.array(self.images) if self.images else None,
            "video_grid_thw": np.array(self.videos) if self.videos else None,
            "second_per_grid_ts": np.array(self.seconds, np.float32) if self.seconds else None,
            "audio_seqlens": np.array(self.audios) if self.audios else None,
            "use_audio_in_video": self.together,
        }


def random_maker(rng: random.Random, spec: MRopeSpec) -> Maker:
    """Return rows of every mixture: text alone among them, and batches of text or audio alone."""
    maker = Maker(rng, spec, together=rng.random() < 0.6)
    kinds = rng.choice(["iva", "iva", "iva", "va", "v", "a", ""])
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        most = 0 if rng.random() < 0.15 or not kinds else rng.choice([1, 2, 4])
        maker.add_row([rng.choice(kinds) for _ in range(most)])
    return maker


def processor_batch(rng: random.Random, spec: MRopeSpec, *, masked: bool = False) -> dict[str, Any]:
    """Return arguments of `rope_index`; `masked`: there always is a mask, which Qwen3-Omni needs."""
    padding = rng.choice(["left", "right", "ragged", "none"])
    return random_maker(rng, spec).batch(padding, masked or rng.random() < 0.5)


def audio_length(spec: MRopeSpec, mel: int) -> int:
    """Return the tokens of an audio: halved twice; or in windows of 13, the rest halved thrice."""
    if is_old(spec):
        return ((mel - 1) // 2 + 1 - 2) // 2 + 1
    chunk = 2 * int(spec.extra["n_window"])
    rest = mel % chunk
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return mel // chunk * 13 + rest


def mix(spec: MRopeSpec, video: list[Any], audio: list[Any], start: Any = 0) -> list[Any]:
    """Return what begins with a time in the order in which it stands: chunks in turn, or by time."""
    if is_old(spec):
        size = int(spec.extra["position_id_per_seconds"] * spec.extra["seconds_per_chunk"])
        first, second = in_chunks(video, size, start), in_chunks(audio, size, start)
        rounds = range(max(len(first), len(second)))
        return [
            one for k in rounds for chunks in (first, second) for one in (chunks[k:] or [[]])[0]
        ]
    video, audio, mixed = video[::-1], audio[::-1], []
    while video and audio:
        mixed.append(video.pop() if video[-1][0] <= audio[-1][0] else audio.pop())
    return mixed + video[::-1] + audio[::-1]


def in_chunks(stream: list[Any], size: int, start: Any) -> list[list[Any]]:
    chunks: list[list[Any]] = [[]]
    for one in stream:
        if one[0] - start >= len(chunks) * size:
            chunks.append([])
        chunks[-1].append(one)
    return chunks


def slow_omni_index(spec: MRopeSpec, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return what `rope_index` must return for a random Omni batch."""
    number = np.int64 if is_old(spec) else np.float32
    ids, mask = batch["input_ids"], batch["attention_mask"]
    media = batch["image_grid_thw"] is not None or batch["video_grid_thw"] is not None
    silent = not media and batch["audio_seqlens"] is None
    if silent and (spec.family, spec.reference) == ("qwen3_omni_moe_talker", "transformers-5.23"):
        own = np.cumsum(np.ones_like(ids) if mask is None else mask != 0, axis=1) - 1
        own = own if mask is None else np.where(mask != 0, own, 0)
        return own[None].repeat(3, axis=0), np.zeros((len(ids), 1), np.int64)
    positions = np.full((3, *ids.shape), 0 if media and not is_old(spec) else 1, number)
    deltas = np.zeros((len(ids), 1), number)
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "audio_seqlens")
    sizes = {n: [] if batch[n] is None else np.asarray(batch[n]).tolist() for n in names}
    for row in range(len(ids)):
        where = [col for col in range(ids.shape[1]) if mask is None or mask[row, col]]
        points = number_row(spec, number, ids[row, where].tolist(), sizes)
        for col, point in zip(where, points, strict=True):
            positions[:, row, col] = point
        top = max((max(point) for point in points), default=number(-1))
        if not media and len(where) < ids.shape[1]:
            top = max(top, number(1))  # the reference looks at padding too
        deltas[row] = top + number(1) - number(len(where))
    assert not any(sizes.values())
    return positions, deltas


def number_row(
    spec: MRopeSpec, number: Any, tokens: list[int], sizes: dict[str, Any]
) -> list[Point]:
    """Number a row: text, the markers before a block, the block, the markers after it, and so on."""
    points: list[Point] = []
    text: list[int] = []
    audio_start = int(spec.extra["audio_start_token_id"])
    at, base = 0, number(0)
    while at < len(tokens):
        if tokens[at] not in (spec.vision_start_token_id, audio_start):
            text.append(tokens[at])
            at += 1
            continue
        points += count_up(number, base, len(text))
        base, text = number(base + number(len(text))), []
        markers = 2 if tokens[at : at + 2] == [spec.vision_start_token_id, audio_start] else 1
        shared = is_old(spec) and markers == 2
        points += [count_up(number, base, 1)[0]] * 2 if shared else count_up(number, base, markers)
        base = number(base + number(1 if shared else markers))
        points_of, top = block(spec, number, base, tokens[at : at + 2], sizes)
        points += points_of
        base = number(top + number(1))
        points += [count_up(number, base, 1)[0]] * 2 if shared else count_up(number, base, markers)
        base = number(max(points[-1]) + number(1))
        at += len(points_of) + 2 * markers
    return points + count_up(number, base, len(text))


def block(
    spec: MRopeSpec, number: Any, base: Any, starts: list[int], sizes: dict[str, Any]
) -> tuple[list[Point], Any]:
    """Return the points of what two tokens begin, and the largest number of its last piece."""
    audio_start = int(spec.extra["audio_start_token_id"])
    if starts[0] == audio_start:
        points = count_up(number, base, audio_length(spec, sizes["audio_seqlens"].pop(0)))
        return points, largest(points)
    if starts[1] == spec.image_token_id:
        points = frames(spec, number, base, sizes["image_grid_thw"].pop(0), 1.0)
        return points, largest(points)
    seconds = sizes["second_per_grid_ts"].pop(0)
    points = frames(spec, number, base, sizes["video_grid_thw"].pop(0), seconds)
    if starts[1] != audio_start:
        return points, largest(points)
    audio = count_up(number, base, audio_length(spec, sizes["audio_seqlens"].pop(0)))
    kinds = [(*point, "video") for point in points], [(*point, "audio") for point in audio]
    mixed = mix(spec, *kinds, base)
    last = mixed[-1][3]
    if is_old(spec):
        size = int(spec.extra["position_id_per_seconds"] * spec.extra["seconds_per_chunk"])
        piece = in_chunks(points if last == "video" else audio, size, base)[-1]
    else:
        piece = []
        while mixed and mixed[-1][3] == last:
            piece.append(mixed.pop())
        mixed += reversed(piece)
        piece = [point[:3] for point in piece]
    return [point[:3] for point in mixed], largest(piece)


def count_up(number: Any, base: Any, length: int) -> list[Point]:
    return [(number(number(step) + base),) * 3 for step in range(length)]


def frames(spec: MRopeSpec, number: Any, base: Any, grid: list[int], seconds: float) -> list[Point]:
    rate, merge = np.float32(spec.extra["position_id_per_seconds"]), spec.spatial_merge_size
    points: list[Point] = []
    for frame in range(grid[0]):
        time = np.float32(np.float32(frame) * np.float32(seconds)) * rate
        for y in range(grid[1] // merge):
            for x in range(grid[2] // merge):
                t, h, w = (number(number(part) + base) for part in (time, y, x))
                points += [(t, h, w)]
    return points


def largest(points: list[Any]) -> Any:
    return max(max(point) for point in points)
