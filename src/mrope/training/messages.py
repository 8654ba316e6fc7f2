"""Read the `messages` of a row: the items of each message, and the pictures that they hold.

An item that is not understood is an error. A chat template would leave it out without a word, and
the model would learn the answer to a question that it was not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError

CLIP_COLUMNS = ("fps", "frame_indices", "frame_times")
"""What a row, or an item of video, may say of the frames of a clip."""

_ROLES = ("system", "user", "assistant", "tool")
# Keys under which an item holds its own picture or clip.
_HELD_BY = {
    "image": ("image", "image_url", "url", "path"),
    "image_url": ("image_url",),
    "video": ("video", "url", "path"),
}


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, ready for a chat template, and what they show.

    Attributes:
        messages: each with `role`, and as `content` a text or items of text, image and video.
        images, videos: one value for each item, in order; None: the next of the row's column.
        clips: what each item of video says of its frames: `fps`, `frame_indices`, `frame_times`.
    """

    messages: list[NewColumns] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    clips: list[NewColumns] = field(default_factory=list)


def read_messages(messages: Any) -> Conversation:
    """Read the messages of a row.

    Args:
        messages: a list of mappings with `role` and `content`. Keys that are null count as absent:
            in a table every item has the keys of all items.

    Raises:
        MRopeError: an unknown role, or an item of an unknown type or without its value; the message
            names both by number, counted from 0.

    Example:
        >>> picture = {"type": "image_url", "image_url": {"url": "cat.png"}}
        >>> read_messages([{"role": "user", "content": [picture]}])
        Conversation(messages=[{'role': 'user', 'content': [{'type': 'image'}]}], \
images=['cat.png'], videos=[], clips=[])
    """
    if not _is_list(messages):
        raise MRopeError(f"messages must be a list, not {_name(messages)}")
    if not messages:
        raise MRopeError("messages is empty")
    read = Conversation()
    for number, message in enumerate(messages):
        where = f"message {number}"
        content = _checked(message, where)["content"]
        if not isinstance(content, str):
            content = [
                _read_item(read, item, f"{where}, item {place}")
                for place, item in enumerate(content)
            ]
        read.messages.append({**message, "content": content})
    return read


def in_order(held: Sequence[Any], column: Sequence[Any]) -> list[Any]:
    """Return the pictures that items show, in order, from the items and from the row's column.

    Args:
        held: as `Conversation.images`.
        column: the row's `images`. If no item holds a picture of its own, all of it is returned:
            the caller compares its number with that of the placeholders in the whole text.

    Raises:
        MRopeError: some items hold pictures, and the column does not have exactly the others.
    """
    wanted = sum(value is None for value in held)
    if wanted == len(held):
        return list(column)
    if wanted != len(column):
        raise MRopeError(
            f"{len(held) - wanted} items of its messages hold a picture or clip of their own, and "
            f"{wanted} do not, but its column holds {len(column)}"
        )
    rest = iter(column)
    return [next(rest) if value is None else value for value in held]


def _checked(message: object, where: str) -> Columns:
    if not isinstance(message, Mapping):
        raise MRopeError(f"{where} must have role and content, not be {_name(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise MRopeError(f"{where}: unknown role {role!r}; known: {', '.join(_ROLES)}")
    if not isinstance(content, str) and not _is_list(content):
        raise MRopeError(
            f"{where}: content must be a text or a list of items, not {_name(content)}"
        )
    return message


def _read_item(read: Conversation, item: object, where: str) -> NewColumns:
    """Return an item as a chat template takes it, and add what it shows to `read`."""
    if not isinstance(item, Mapping):
        raise MRopeError(f"{where} must be a mapping with a type, not {_name(item)}")
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.get("type")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise MRopeError(f"{where}: text must be a text, not {_name(item.get('text'))}")
        return {"type": "text", "text": item["text"]}
    if kind not in _HELD_BY:
        raise MRopeError(_describe_unknown_type(kind, where))
    key = next((key for key in _HELD_BY[kind] if key in item), kind)
    value = _url(item.get(key), where) if key == "image_url" else item.get(key)
    if kind == "video":
        read.videos.append(value)
        read.clips.append({name: item[name] for name in CLIP_COLUMNS if name in item})
        return {"type": "video"}
    # A chat template writes the same placeholder for both kinds of images.
    read.images.append(value)
    return {"type": "image"}


def _url(value: object, where: str) -> str:
    """Return the URL of an item in either form, plain or nested as OpenAI's API has it."""
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise MRopeError(f"{where}: image_url must hold a path or a data: URL, not {_name(url)}")
    return url


def _describe_unknown_type(kind: object, where: str) -> str:
    known = f"known: text, {', '.join(_HELD_BY)}"
    if kind is None:
        return f"{where} has no type; {known}"
    hint = " (video files are not decoded here: give the frames)" if kind == "video_url" else ""
    return f"{where}: unknown type {kind!r}{hint}; {known}"


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _name(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
