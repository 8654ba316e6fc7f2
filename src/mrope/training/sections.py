"""The sections of a training config and the checks of their values.

What each key means stands in docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from typing_extensions import Self

from mrope.collate.ladder import Shapes
from mrope.collate.packing import Flatten
from mrope.collate.skip_bad import SkipBad
from mrope.errors import MRopeError
from mrope.spec.references import REFERENCES, nearest
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec
from mrope.training.open_source import DATA_FILES, split_source

# Fields of `TrainingArguments` that hold a path.
_PATHS = ("output_dir", "resume_from_checkpoint")

DEMO = "demo"
SYNTHETIC = "synthetic"


class ConfigError(MRopeError):
    """A config cannot be used. The message names the file and lists every problem in it."""


@contextmanager
def errors_of(key: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of a block, of these kinds, as a `ConfigError` that names the key."""
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{key}: {error}") from error


def problems_error(name: str, problems: Sequence[str]) -> ConfigError:
    """Return the error that lists all problems of a file or section."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{name}: {count}" + "".join(f"\n  {problem}" for problem in problems))


def _resolved(value: str, info: ValidationInfo) -> str:
    """Return a path relative to the folder of the config file as one that can be opened."""
    return str((info.context or {}).get("folder", Path()) / Path(value).expanduser())


def _model_config(value: object, info: ValidationInfo) -> object:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a mapping (the model's config) or a path")
    path = Path(_resolved(value, info))
    # Checked when the file is read, so that all problems of a config are listed at once.
    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise ValueError(
            f"no config at {path}; give a config.json or the local folder that holds it "
            "(nothing is downloaded from a hub)"
        )
    return str(path)


def _data_source(value: str, info: ValidationInfo) -> str:
    if value in (DEMO, SYNTHETIC):
        return value
    source = _resolved(value, info)
    path, _ = split_source(source)
    if not path.exists():
        raise ValueError(
            f"nothing at {path}; give {DEMO!r}, {SYNTHETIC!r}, or the path of a dataset"
        )
    if path.is_file() and not path.name.endswith(DATA_FILES):
        raise ValueError(
            f"cannot read {path.name}; a dataset is a folder written by save_to_disk, or a file "
            f"or folder of files that end in {', '.join(DATA_FILES)}"
        )
    return source


def _with_paths(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Return `trainer` with its paths as ones that can be opened."""

    def is_path(key: str, entry: object) -> bool:
        # `resume_from_checkpoint: true` is the last checkpoint, in transformers as a text too.
        return key in _PATHS and isinstance(entry, str) and entry.lower() not in ("true", "false")

    return {key: _resolved(one, info) if is_path(key, one) else one for key, one in value.items()}


def _folder(value: str, info: ValidationInfo) -> str:
    path = Path(_resolved(value, info))
    if not path.is_dir():
        raise ValueError(f"no folder at {path}")
    return str(path)


def _reference(value: object) -> object:
    # Not a Literal: the names are keys of a table, and a misspelt one gets a suggestion. Before the
    # type is checked: YAML reads 5.23 as a number.
    known = ("auto", *REFERENCES)
    if value not in known:
        raise ValueError(f"must be one of {', '.join(known)}{nearest(str(value), known)}")
    return value


class _Section(BaseModel):
    # Frozen: the config is checked as a whole, and a later change would not be.
    # Strict: a quoted number, or 1.0 for a count, is a mistake in the file and not a value.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """The model to train."""

    config: Annotated[dict[str, Any] | str, BeforeValidator(_model_config)]
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    attach: bool = False
    attention: Literal["auto", "varlen", "segments"] = "auto"
    compile: Literal[False, True, "layers", "whole"] = False


_Count = Annotated[int, Field(ge=1)]
_Natural = Annotated[int, Field(ge=0)]
_Sides = Annotated[list[_Count], Field(min_length=2, max_length=2)]


class ShapeSection(_Section):
    """The shape of synthetic rows, which are filled up with text; sides and frames in patches.

    With `image_sides`, least and largest, each side of an image is drawn between them; with
    `least_width` the tokens of each row, from it up to `width`.
    """

    width: _Count
    least_width: _Count | None = None
    images: _Natural = 0
    image: _Sides = [16, 16]
    image_sides: _Sides | None = None
    videos: _Natural = 0
    frames: _Count = 1
    frame: _Sides = [16, 16]

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        if self.least_width is not None and self.least_width > self.width:
            raise ValueError(
                f"data.shape.least_width: must be at most width={self.width}, not "
                f"{self.least_width}"
            )
        if self.image_sides is not None and self.image_sides[0] > self.image_sides[1]:
            raise ValueError(
                f"data.shape.image_sides: must be least and largest side, not {self.image_sides}"
            )
        return self


class DataSection(_Section):
    """The rows to train on."""

    source: Annotated[str, AfterValidator(_data_source)] = DEMO
    eval_source: Annotated[str, AfterValidator(_data_source)] | None = None
    shape: ShapeSection | None = None
    rows: _Count | None = None
    processor: Annotated[str, AfterValidator(_folder)] | None = None
    min_pixels: _Count | None = None
    max_pixels: _Count | None = None
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    loss: Literal["all", "answers"] = "all"
    download: bool = False

    @model_validator(mode="after")
    def _shape_is_of_synthetic_rows(self) -> Self:
        if (self.source == SYNTHETIC) != (self.shape is not None):
            raise ValueError(
                f"data.shape is required with data.source: {SYNTHETIC}, and refused with any other"
            )
        return self


class DataLoaderSection(_Section):
    """Arguments of `torch.utils.data.DataLoader`, and the budgets that fill batches."""

    batch_size: _Count = 4
    max_tokens: _Count | None = None
    buffer_size: _Count | None = None
    max_patches: _Count | None = None
    balance: Literal["tokens", "work"] = "tokens"
    num_workers: _Natural = 2
    pin_memory: bool = True
    start_method: Literal["spawn", "fork", "forkserver"] = "spawn"
    persistent_workers: bool = True
    prefetch_factor: _Count = 2

    @model_validator(mode="after")
    def _batches_have_a_token_budget(self) -> Self:
        for name in ("max_patches", "balance", "buffer_size"):
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and self.max_tokens is None:
                raise ValueError(f"dataloader.{name} needs dataloader.max_tokens")
        if self.buffer_size is not None and self.balance != "tokens":
            raise ValueError("dataloader.balance needs the sampler: remove dataloader.buffer_size")
        return self


class ShapesSection(_Section):
    """A ladder of fixed shapes: the keys are those of `mrope.Shapes`."""

    tokens: list[int]
    patches: list[int] = []
    longest: int = 4096
    patches_per_segment: int = 64
    tokens_per_example: int = 256

    @model_validator(mode="after")
    def _is_a_ladder(self) -> Self:
        self.ladder()  # checks its own values, and raises ValueError
        return self

    def ladder(self, pad_token_id: int = 0) -> Shapes:
        """Return the collator's option."""
        return Shapes(**self.model_dump(), pad_token_id=pad_token_id)


class RopeSection(_Section):
    """What the collator computes in the workers, and by which release's rule."""

    enabled: bool = True
    reference: Annotated[str, BeforeValidator(_reference)] = "auto"
    vision: bool = False
    packing: Literal["flatten"] | None = None
    layout: Literal["model", "batch"] = "model"
    shapes: ShapesSection | None = None
    pad_to_multiple_of: int = 1
    on_error: Literal["raise", "skip"] = "raise"
    rejects: Annotated[str, AfterValidator(_resolved)] | None = None
    max_rejects: int | float | None = None
    max_rejects_in_a_row: int | None = 100

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.pad_to_multiple_of != 1 and self.packing is None:
            raise ValueError("rope.pad_to_multiple_of needs rope.packing: flatten")
        for name in ("rejects", "max_rejects", "max_rejects_in_a_row"):
            if name in self.model_fields_set and self.on_error != "skip":
                raise ValueError(f"rope.{name} needs rope.on_error: skip")
        # Both check their own values, and raise ValueError.
        self.flatten()
        self.skip_bad()
        return self

    def flatten(self, pad_token_id: int = 0, attached: bool = False) -> Flatten | None:
        """Return the collator's options of packing; None: batches stay padded."""
        return self.packing and Flatten(self.pad_to_multiple_of, pad_token_id, attached)

    def skip_bad(self) -> Literal["raise"] | SkipBad:
        """Return the collator's options for bad examples."""
        if self.on_error == "raise":
            return "raise"
        return SkipBad(
            rejects=self.rejects,
            max_rejects=self.max_rejects,
            max_rejects_in_a_row=self.max_rejects_in_a_row,
        )


class Config(_Section):
    """A whole training config, as `load_config` returns it; its paths can be opened as they are.

    Attributes:
        trainer: fields of transformers' `TrainingArguments`; see `mrope.training.arguments`, which
            checks them when training starts, since transformers is not imported here.
        peft: fields of peft's `LoraConfig`; None: all weights are trained.
    """

    model: ModelSection
    data: DataSection = DataSection()
    dataloader: DataLoaderSection = DataLoaderSection()
    rope: RopeSection = RopeSection()
    trainer: Annotated[dict[str, Any], AfterValidator(_with_paths)] = {}
    peft: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        model, loader, rope = self.model, self.dataloader, self.rope
        fixed = rope.shapes is not None and bool(rope.shapes.patches)
        for wrong, words in (
            (
                rope.enabled and model.attach and not rope.vision,
                "model.attach: true needs rope.vision: true",
            ),
            (
                rope.enabled and fixed and not model.attach,
                "rope.shapes with patches needs model.attach: true",
            ),
            (
                rope.enabled and model.compile and not fixed,
                "model.compile needs rope.shapes with patches: each shape would compile anew",
            ),
            (
                loader.max_tokens is not None and rope.packing is None,
                "dataloader.max_tokens needs rope.packing: flatten",
            ),
            (
                loader.buffer_size is not None and rope.shapes is not None,
                "rope.shapes needs the sampler: remove dataloader.buffer_size",
            ),
        ):
            if wrong:
                raise ValueError(words)
        return self

    @property
    def seed(self) -> int:
        """The seed of random weights, of the rows' order and of the demo's rows."""
        return int(self.trainer.get("seed", 42))  # the default of `TrainingArguments`

    def spec(self) -> MRopeSpec:
        """Return the spec of the model under the chosen reference, without transformers."""
        with errors_of("model.config", MRopeError):
            return MRopeSpec.from_config(self.model.config, self.rope.reference)

    def vision_spec(self) -> VisionSpec | None:
        """Return the spec of the vision tower; None with `rope.vision: false`."""
        if not self.rope.vision:
            return None
        with errors_of("model.config", MRopeError):
            return VisionSpec.from_config(self.model.config)
