"""The demo's rows: conversations about photographs that scikit-image and scikit-learn carry.

No row is downloaded: each photograph named here lies inside a wheel. Rows differ in what a batch
must cope with: one image, several, a clip, an image and a clip, text alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import datasets
from PIL import Image

from mrope.training.demo.tokenizer import corpus

CAPTIONS = {
    "astronaut": "A woman in an orange space suit smiles in front of a flag.",
    "chelsea": "A brown cat looks at the camera with green eyes.",
    "coffee": "A white cup of coffee stands on a red saucer.",
    "rocket": "A rocket stands on its launch pad in the light of many lamps.",
    "china.jpg": "A tower with several roofs stands above the trees at a lake.",
    "flower.jpg": "An orange flower with many petals stands before dark leaves.",
}
_DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
# Sides in pixels. Small, since the demo has to be quick on two cores.
_SMALLEST, _LARGEST = 64, 144


class _Turn(NamedTuple):
    """One exchange, and what is shown in it."""

    question: str
    answer: str
    images: Sequence[Image.Image] = ()
    clips: Sequence[Sequence[Image.Image]] = ()
    fps: float | None = None


def photographs(rows: int, seed: int = 0) -> datasets.Dataset:
    """Return the demo's rows; the same for the same arguments.

    Args:
        rows: how many. Any five in a row hold one of each kind.
        seed: of the crops, the captions' order and the clips' lengths.

    Returns:
        A dataset in memory with the columns `messages` (roles, and items of text, image or video in
        order), `images` (PIL images), `videos` (lists of frames) and `fps` (frames per second of
        the row's clips; null where there are none).
    """
    made = [_row(index, random.Random(f"{seed} {index}")) for index in range(rows)]
    return datasets.Dataset.from_list(made, features=_features())


def _features() -> datasets.Features:
    text = datasets.Value("string")
    item = {"type": text, "text": text}
    return datasets.Features(
        messages=datasets.List({"role": text, "content": datasets.List(item)}),
        images=datasets.List(datasets.Image()),
        videos=datasets.List(datasets.List(datasets.Image())),
        fps=datasets.Value("float64"),
    )


def _row(index: int, rng: random.Random) -> dict[str, Any]:
    turn = _KINDS[index % len(_KINDS)](rng)
    shown = [{"type": "image"}] * len(turn.images) + [{"type": "video"}] * len(turn.clips)
    return {
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
        ],
        "images": list(turn.images),
        "videos": list(turn.clips),
        "fps": turn.fps,
    }


def _one_image(rng: random.Random) -> _Turn:
    name = rng.choice(list(CAPTIONS))
    return _Turn("What is shown in this picture?", CAPTIONS[name], [_crop(name, rng)])


def _several_images(rng: random.Random) -> _Turn:
    names = rng.sample(list(CAPTIONS), k=rng.choice([2, 3]))
    return _Turn(
        "Describe the pictures.",
        " ".join(CAPTIONS[name] for name in names),
        [_crop(name, rng) for name in names],
    )


def _clip(rng: random.Random) -> _Turn:
    name, direction = rng.choice(list(CAPTIONS)), rng.choice(list(_DIRECTIONS))
    answer = f"{CAPTIONS[name]} The view moves {direction}."
    frames = _pan(name, direction, rng)
    return _Turn("What happens in this clip?", answer, clips=[frames], fps=_fps(rng))


def _image_and_clip(rng: random.Random) -> _Turn:
    first, second = rng.sample(list(CAPTIONS), k=2)
    direction = rng.choice(list(_DIRECTIONS))
    answer = f"{CAPTIONS[first]} In the clip the view moves {direction}. {CAPTIONS[second]}"
    images, clips = [_crop(first, rng)], [_pan(second, direction, rng)]
    return _Turn(
        "What can you see in the picture and in the clip?", answer, images, clips, _fps(rng)
    )


def _text(rng: random.Random) -> _Turn:
    return _Turn("Tell me something about pictures.", rng.choice(corpus()))


_KINDS: tuple[Callable[[random.Random], _Turn], ...] = (
    _one_image,
    _several_images,
    _clip,
    _text,
    _image_and_clip,
)


def _fps(rng: random.Random) -> float:
    # Three frames a second put two thirds of a second between two layers of a clip: a fraction.
    return rng.choice([2.0, 3.0, 4.0])


def _crop(name: str, rng: random.Random) -> Image.Image:
    """Return a random part of a photograph, scaled to a random small size of its shape."""
    photo = _photograph(name)
    share = rng.uniform(0.5, 1.0)
    width, height = int(photo.width * share), int(photo.height * share)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    part = photo.crop((left, top, left + width, top + height))
    part.thumbnail((rng.randint(_SMALLEST, _LARGEST),) * 2)
    return part


def _pan(name: str, direction: str, rng: random.Random) -> list[Image.Image]:
    """Return the frames of a clip: a window that moves over a photograph, 3 to 8 frames."""
    photo = _photograph(name)
    frames = rng.randint(3, 8)
    width, height = photo.width // 2, photo.height // 2
    across, down = _DIRECTIONS[direction]
    made = []
    for number in range(frames):
        # From -1 to 1 along the way, so that the window goes from one border to the other.
        way = 2 * number / (frames - 1) - 1
        left = (photo.width - width) / 2 * (1 + across * way)
        top = (photo.height - height) / 2 * (1 + down * way)
        frame = photo.crop((int(left), int(top), int(left) + width, int(top) + height))
        made.append(frame.resize((96, 96 * height // width)))
    return made


@cache
def _photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())
