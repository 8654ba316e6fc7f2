"""The demo's rows: conversations about photographs that scikit-image and scikit-learn ship.

Nothing is downloaded: each photograph named here is a file of an installed package. Rows are of the
five kinds that a batch can mix: one image, several, a clip, an image and a clip, text alone.
"""

from __future__ import annotations

import random
from functools import cache

import datasets
from PIL import Image

from mrope.columns import NewColumns
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
# Limits of an image's longer side in pixels: small, so that the demo is quick on two cores.
_SMALLEST, _LARGEST = 64, 144


def photographs(rows: int, seed: int = 0) -> datasets.Dataset:
    """Make the demo's rows; equal arguments give equal rows.

    Args:
        rows: number of rows. Any five adjacent ones are of the five kinds.
        seed: of the crops, the captions' order and the clips' lengths.

    Returns:
        A dataset in memory with the columns `messages` (roles, and items of text, image or video in
        order), `images` (PIL images), `videos` (lists of frames) and `fps` (frames per second of
        the row's clips; null without clips).
    """
    # Seeded by seed and index, so that a row does not depend on how many are made.
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


def _row(index: int, rng: random.Random) -> NewColumns:
    """Return the row of an index, which decides its kind."""
    question, shown, panned, answer = _KINDS[index % len(_KINDS)](rng)
    # In this order: every call takes random numbers.
    images = [_crop(name, rng) for name in shown]
    videos = [_pan(name, direction, rng) for name, direction in panned]
    # At 3 frames a second, a pair of frames lasts 2/3 s: a case that float32 cannot hold exactly.
    fps = rng.choice([2.0, 3.0, 4.0]) if videos else None
    items = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    messages = [
        {"role": "user", "content": [*items, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"messages": messages, "images": images, "videos": videos, "fps": fps}


def _one_image(rng: random.Random) -> _Turn:
    name = rng.choice(list(CAPTIONS))
    return "What is shown in this picture?", [name], [], CAPTIONS[name]


def _several_images(rng: random.Random) -> _Turn:
    names = rng.sample(list(CAPTIONS), k=rng.choice([2, 3]))
    return "Describe the pictures.", names, [], " ".join(CAPTIONS[name] for name in names)


def _clip(rng: random.Random) -> _Turn:
    name, direction = rng.choice(list(CAPTIONS)), rng.choice(list(_DIRECTIONS))
    answer = f"{CAPTIONS[name]} The view moves {direction}."
    return "What happens in this clip?", [], [(name, direction)], answer


def _text(rng: random.Random) -> _Turn:
    return "Tell me something about pictures.", [], [], rng.choice(corpus())


def _image_and_clip(rng: random.Random) -> _Turn:
    first, second = rng.sample(list(CAPTIONS), k=2)
    direction = rng.choice(list(_DIRECTIONS))
    answer = f"{CAPTIONS[first]} In the clip the view moves {direction}. {CAPTIONS[second]}"
    question = "What can you see in the picture and in the clip?"
    return question, [first], [(second, direction)], answer


# A question, the photographs that it shows, those that a clip pans in a direction, and the answer.
_Turn = tuple[str, list[str], list[tuple[str, str]], str]
_KINDS = (_one_image, _several_images, _clip, _text, _image_and_clip)


def _crop(name: str, rng: random.Random) -> Image.Image:
    """Return a random part of a photograph, scaled down with its aspect ratio kept."""
    photo = _photograph(name)
    share = rng.uniform(0.5, 1.0)
    width, height = int(photo.width * share), int(photo.height * share)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    part = photo.crop((left, top, left + width, top + height))
    part.thumbnail((rng.randint(_SMALLEST, _LARGEST),) * 2)
    return part


def _pan(name: str, direction: str, rng: random.Random) -> list[Image.Image]:
    """Return the 3 to 8 frames of a clip: a window that moves across a photograph."""
    photo = _photograph(name)
    frames = rng.randint(3, 8)
    width, height = photo.width // 2, photo.height // 2
    across, down = _DIRECTIONS[direction]
    made = []
    for number in range(frames):
        # From -1 to 1, so that the window moves from one border of the photograph to the other.
        progress = 2 * number / (frames - 1) - 1
        left = (photo.width - width) / 2 * (1 + across * progress)
        top = (photo.height - height) / 2 * (1 + down * progress)
        frame = photo.crop((int(left), int(top), int(left) + width, int(top) + height))
        made.append(frame.resize((96, 96 * height // width)))
    return made


# Decoding takes longer than cropping, and every photograph is used many times.
@cache
def _photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())
