"""Read pictures and clips as rows hold them; nothing is downloaded or decoded from video files."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
from PIL import Image, UnidentifiedImageError

from mrope.errors import MRopeError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)


def read_picture(value: Any, folder: Path) -> Image.Image:
    """Return a picture, decoded.

    Args:
        value: a PIL image, a path, a `file:` or base64 `data:` URL, or the mapping of bytes and
            path that `datasets` has for an image.
        folder: folder that relative paths are relative to.

    Raises:
        MRopeError: another URL, another type, or a picture that cannot be decoded.
    """
    if isinstance(value, Image.Image):
        return value
    try:
        picture = _open(value, folder)
        # Decoded here, where the error can be told apart: PIL only reads the header at first.
        picture.load()
    except FileNotFoundError as error:
        raise MRopeError(f"cannot read a picture: no file {str(error.filename)!r}") from error
    except UnidentifiedImageError as error:
        name = value if isinstance(value, str) else "its bytes"
        raise MRopeError(f"cannot read a picture: no image in {name[:80]!r}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MRopeError(f"cannot read a picture: {error}") from error
    return picture


def read_frames(value: Any, folder: Path) -> list[Image.Image]:
    """Return the frames of a clip.

    Args:
        value: a list of pictures as `read_picture` takes them, all of one size.
        folder: as of `read_picture`.

    Raises:
        MRopeError: a video file, no frames, or frames of several sizes.
    """
    if not isinstance(value, list):
        raise MRopeError(
            f"a video must be a list of frames, not {type(value).__name__}: video files are not "
            "decoded here; decode them when you write the dataset"
        )
    frames = [read_picture(frame, folder) for frame in value]
    if len({frame.size for frame in frames}) != 1:
        raise MRopeError("a video must have frames, all of one size")
    return frames


def _open(value: Any, folder: Path) -> Image.Image:
    if isinstance(value, str):
        return Image.open(io.BytesIO(_read_url(value, folder)))
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value):
        picture: Image.Image = datasets.Image().decode_example(dict(value))
        return picture
    raise MRopeError(f"a picture must be an image or a path, not {type(value).__name__}")


def _read_url(value: str, folder: Path) -> bytes:
    """Return the bytes of the file that a path or URL names."""
    found = _SCHEME.match(value)
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        head, _, body = value.partition(",")
        if not head.endswith(";base64"):
            raise MRopeError(f"a data: URL must hold base64, not {head[:40]!r}")
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    if scheme == "file":
        return Path(unquote(urlsplit(value).path)).read_bytes()
    if value[len(scheme) :].startswith("://"):
        raise MRopeError(
            f"{value[:80]!r} is not read, since nothing is downloaded; give a path or a data: URL"
        )
    return (folder / value).read_bytes()
