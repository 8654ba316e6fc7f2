"""Open pictures and clips as rows hold them; nothing is downloaded unless it is allowed."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, UnidentifiedImageError

from mrope.errors import MRopeError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


def read_picture(value: object, folder: Path, download: bool = False) -> Image.Image:
    """Return a picture, decoded, as RGB, and turned as its EXIF says: `load_image` of transformers.

    Args:
        value: a PIL image, its encoded bytes, a path, a `file:`, `http:`, `https:` or base64
            `data:` URL, base64 alone, or the mapping of bytes and path that `datasets` has.
        folder: folder that relative paths are relative to.
        download: whether `http:` and `https:` URLs are read.

    Raises:
        MRopeError: a URL that is not read, another type, or a picture that cannot be decoded.
    """
    from transformers.image_utils import load_image

    with _opened(value, folder, download) as picture:
        read: Image.Image = load_image(picture)
    return read


def picture_size(value: object, folder: Path, download: bool = False) -> tuple[int, int]:
    """Return height and width of a picture as `read_picture` returns it, from its header alone.

    Raises:
        MRopeError: as `read_picture`, but damaged pixels are not noticed.
    """
    with _opened(value, folder, download) as picture:
        # PIL would decode a PNG to look for a tag behind its pixels, where none is written.
        tagged = picture.format != "PNG" or "exif" in picture.info
        turned = tagged and picture.getexif().get(_ORIENTATION) in _QUARTER_TURNS
        width, height = picture.size
    return (width, height) if turned else (height, width)


def frames_of(value: object) -> list[Any]:
    """Return the frames of a clip, which must be a list."""
    if not isinstance(value, list):
        raise MRopeError(
            f"a video must be a list of frames, not {type(value).__name__}: video files are not "
            "decoded here; decode them when you write the dataset"
        )
    if not value:
        raise MRopeError("a video must have frames, all of one size")
    return value


@contextmanager
def _opened(value: object, folder: Path, download: bool) -> Iterator[Image.Image]:
    """Open a picture, close it if it is not the row's own, and raise its errors as ours."""
    try:
        picture = _open(value, folder, download)
        try:
            yield picture
        finally:
            if picture is not value:
                picture.close()
    except _UNREADABLE as error:
        raise _named(error, value) from error


_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def _named(error: Exception, value: object) -> MRopeError:
    if isinstance(error, MRopeError):
        return error
    if isinstance(error, FileNotFoundError):
        return MRopeError(f"cannot read a picture: no file {str(error.filename)[:80]!r}")
    if isinstance(error, UnidentifiedImageError):
        name = value if isinstance(value, str) else "its bytes"
        return MRopeError(f"cannot read a picture: no image in {name[:80]!r}")
    return MRopeError(f"cannot read a picture: {error}")


def _open(value: object, folder: Path, download: bool) -> Image.Image:
    """Return a picture whose header is read, and whose pixels are not."""
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value):
        # As `datasets` does: bytes win, and a path beside them is a name alone.
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str):
        return _open_text(value, folder, download)
    raise MRopeError(f"a picture must be an image or a path, not {type(value).__name__}")


def _open_text(value: str, folder: Path, download: bool) -> Image.Image:
    found = _SCHEME.match(value)
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        head, _, body = value.partition(",")
        if not head.endswith(";base64"):
            raise MRopeError(f"a data: URL must hold base64, not {head[:40]!r}")
        return Image.open(io.BytesIO(_decoded(unquote(body))))
    if scheme == "file":
        return Image.open(unquote(urlsplit(value).path))
    if value[len(scheme) :].startswith("://"):
        return _download(value, scheme, download)
    try:
        return Image.open(folder / value)
    except OSError:  # no such file, or a name too long to be one
        try:
            return Image.open(io.BytesIO(_decoded(value)))
        except (binascii.Error, UnicodeEncodeError, UnidentifiedImageError):
            pass
        raise


def _download(url: str, scheme: str, download: bool) -> Image.Image:
    if scheme not in ("http", "https"):
        raise MRopeError(f"{url[:80]!r} is not read: give a path, or an http or data: URL")
    if not download:
        raise MRopeError(
            f"{url[:80]!r} is not read, since nothing is downloaded; give a path or a data: URL, "
            "or set data.download: true"
        )
    from transformers.image_utils import load_image

    try:
        picture: Image.Image = load_image(url)
    # Its client raises errors of its own, and is another one in other releases.
    except Exception as error:
        raise MRopeError(f"{url[:80]!r} cannot be downloaded: {error}") from error
    return picture


def _decoded(text: str) -> bytes:
    return base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
