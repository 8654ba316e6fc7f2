"""Turn a row of `messages` into a batch's columns with the model's own processor, in a worker.

Nothing is prepared ahead. How many tokens and patches a row will have is told by its sizes: headers
of pictures, and the processor's own functions that write placeholders for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mrope.collate.single_row import RowSize
from mrope.columns import IGNORED_LABEL, Columns, NewColumns
from mrope.errors import MRopeError
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec
from mrope.training.answers import answer_spans, answer_tokens
from mrope.training.clips import video_metadata
from mrope.training.messages import Conversation, in_order, read_messages
from mrope.training.naming import naming_row
from mrope.training.pictures import frames_of, picture_size, read_picture
from mrope.training.sizes import count_columns, count_text

if TYPE_CHECKING:
    from mrope.training.sections import DataSection

_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
_REPLACED = "text_replacement_offsets"


@dataclass
class Conversations:
    """Prepare rows of `messages`, `images`, `videos`, `fps`, `frame_indices` and `frame_times`.

    Pickled without its processor, which each worker loads when it prepares its first row.

    Args:
        spec: of the model.
        data: the config's section: limits of pixels, `fps`, `loss` and `download`.
        source: folder of the processor; None: the demo's, for the tower in `patches`.
        pictures: what relative paths of pictures are relative to.
        trust_remote_code: of the processor.
        model_type: of the model's config, and `patches` the sizes of its tower's patches.
    """

    spec: MRopeSpec
    data: DataSection
    source: str | None
    pictures: Path
    model_type: str
    patches: Mapping[str, int]
    trust_remote_code: bool = False
    _loaded: Any = field(default=None, repr=False)

    def __getstate__(self) -> NewColumns:
        return {**self.__dict__, "_loaded": None}

    @property
    def processor(self) -> Any:
        """The processor of this process."""
        if self._loaded is None:
            from mrope.training.processor import limit_pixels, load_processor

            if self.source is None:
                from mrope.training.demo.processor import demo_processor

                self._loaded = demo_processor(self.model_type, self.patches)
            else:
                self._loaded = load_processor(self.source, self.trust_remote_code)
            limits = {"min_pixels": self.data.min_pixels, "max_pixels": self.data.max_pixels}
            # In families with frames apart, own limits are those of all frames of a clip together.
            by_frame = self.source is None or not self.spec.family_row.frames_apart
            limit_pixels(self._loaded, limits, clips=by_frame)
        return self._loaded

    def prepare(self, row: Columns, index: int) -> NewColumns:
        """Return a row's columns, as the processor returns them, and `labels`.

        Raises:
            MRopeError: anything is wrong with the row, which the message names.
        """
        with naming_row(index):
            return self._prepare(row)

    def count(self, row: Columns, index: int) -> RowSize:
        """Return the size of a row as `prepare` would return it, without decoding a pixel.

        Raises:
            MRopeError: as `prepare`, except for damaged pixels.
        """
        with naming_row(index):
            if hasattr(self.processor, "get_text_with_replacements"):
                return self._count(row)
            # Before that function, processors wrote placeholders for processed pictures alone.
            return count_columns(self.spec, self._prepare(row))

    def _prepare(self, row: Columns) -> NewColumns:
        talk = read_messages(row.get("messages"))
        images, clips = _shown(talk, row)
        videos = [self._read(frames_of(clip)) for clip in clips]
        if any(len({frame.size for frame in frames}) != 1 for frames in videos):
            raise MRopeError("a video must have frames, all of one size")
        options: NewColumns = {"images": self._read(images)} if images else {}
        if videos:
            metadata = video_metadata(row, talk.clips, [*map(len, videos)], self.data.fps)
            options |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        if self.data.loss == "answers":
            options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        text = self._text(talk, len(images), len(clips))
        made = dict(self.processor(text=[text], return_tensors="pt", **options))
        return self._columns(made, talk.messages, text)

    def _read(self, pictures: Sequence[Any]) -> list[Any]:
        return [read_picture(one, self.pictures, self.data.download) for one in pictures]

    def _text(self, talk: Conversation, images: int, clips: int) -> str:
        """Return a conversation as text, which must show all of its images and clips."""
        text: str = self.processor.apply_chat_template(talk.messages, tokenize=False)
        for kind, token, count in (
            ("images", getattr(self.processor, "image_token", None), images),
            ("videos", getattr(self.processor, "video_token", None), clips),
        ):
            shown = text.count(token) if token else count
            if shown != count:
                raise MRopeError(
                    f"its messages show {shown} {kind}, but its column holds {count} ({token} "
                    "typed as text counts too)"
                )
        return text

    def _columns(self, made: NewColumns, messages: Sequence[Any], text: str) -> NewColumns:
        """Return what the processor made of a row without a batch's axis, and labels."""
        offsets, replaced = made.pop("offset_mapping", None), made.pop(_REPLACED, None)
        columns = {name: one[0] if name in _TOKENS else one for name, one in made.items()}
        ids = columns["input_ids"]
        types = torch.from_numpy(token_types(self.spec, ids.numpy()))
        columns.setdefault("mm_token_type_ids", types)
        ignored = types > 0
        if self.data.loss == "answers":
            if offsets is None:
                raise MRopeError("data.loss: answers needs a fast tokenizer")
            spans = answer_spans(self.processor, messages, text)
            ignored |= ~answer_tokens(spans, offsets[0], replaced[0] if replaced else [])
        return columns | {"labels": ids.masked_fill(ignored, IGNORED_LABEL)}

    def _count(self, row: Columns) -> RowSize:
        talk = read_messages(row.get("messages"))
        images, clips = _shown(talk, row)
        frames = [frames_of(clip) for clip in clips]
        times = video_metadata(row, talk.clips, [*map(len, frames)], self.data.fps)
        sizes = [
            {"frames": len(one), "metadata": metadata, **self._size(one[0])}
            for one, metadata in zip(frames, times, strict=True)
        ]
        shown = [(size["height"], size["width"]) for size in map(self._size, images)]
        return count_text(self.processor, self._text(talk, len(images), len(clips)), shown, sizes)

    def _size(self, picture: object) -> dict[str, int]:
        height, width = picture_size(picture, self.pictures, self.data.download)
        return {"height": height, "width": width}


def _shown(talk: Conversation, row: Columns) -> tuple[list[Any], list[Any]]:
    """Return the images and clips that a row shows, in order."""
    images = row.get("images")
    if images is not None and not isinstance(images, (list, tuple)):
        images = [images]  # a single one may stand alone
    return in_order(talk.images, images or []), in_order(talk.videos, row.get("videos") or [])
