"""The sections of a training config, and what each key means."""

from __future__ import annotations

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

from mrope.errors import MRopeError
from mrope.spec.references import REFERENCES, nearest
from mrope.spec.spec import MRopeSpec
from mrope.towers.vision import VisionSpec

DEMO = "demo"


SYNTHETIC = "synthetic"


_DATA_FILES = (".parquet", ".jsonl")


class ConfigError(MRopeError):
    """A config that cannot be used. The message names the file and lists every problem in it."""


def _resolved(value: str, info: ValidationInfo) -> str:
    """Return a path as it is seen from the folder of the config file."""
    return str((info.context or {}).get("folder", Path()) / Path(value).expanduser())


def _model_config(value: object, info: ValidationInfo) -> object:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a mapping (the model's config) or a path")
    path = Path(_resolved(value, info))
    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise ValueError(
            f"no config at {path}; give a config.json or the local folder that holds it "
            "(nothing is downloaded from a hub)"
        )
    return str(path)


def _data_source(value: str, info: ValidationInfo) -> str:
    if value in (DEMO, SYNTHETIC):
        return value
    path = Path(_resolved(value, info))
    if not path.exists():
        raise ValueError(
            f"nothing at {path}; give {DEMO!r}, {SYNTHETIC!r}, or the path of a dataset"
        )
    if path.is_file() and path.suffix not in _DATA_FILES:
        raise ValueError(
            f"cannot read {path.name}; a dataset is a folder written by Dataset.save_to_disk, "
            f"or a file that ends in {' or '.join(_DATA_FILES)}"
        )
    return str(path)


def _folder(value: str, info: ValidationInfo) -> str:
    path = Path(_resolved(value, info))
    if not path.is_dir():
        raise ValueError(f"no folder at {path}")
    return str(path)


def _reference(value: str) -> str:
    known = ("auto", *REFERENCES)
    if value not in known:
        raise ValueError(f"must be one of {', '.join(known)}{nearest(value, known)}")
    return value


def _count_or_share(value: float) -> float:
    if value < 0 or (isinstance(value, float) and not 0 < value < 1):
        raise ValueError("must be a count (an integer from 0), or a share between 0 and 1")
    return value


class _Section(BaseModel):
    # Strict: a quoted number, or 1.0 for a count, is a mistake in the file and not a value.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """Which model is trained.

    Attributes:
        config: the model's config as transformers knows it: a mapping, the path of a
            `config.json`, or a local model folder. Weights that lie in the folder are loaded; else
            they are random.
        attn_implementation: what transformers is told under the same name.
        trust_remote_code: a folder that carries its own model class may run its code.
        attach: the model only reads (`mrope.hf.attach`); needs `rope.vision`. With `rope.enabled:
            false` it has no effect: the model computes for itself.
    """

    config: Annotated[dict[str, Any] | str, BeforeValidator(_model_config)]
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    attach: bool = False


Sides = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]


class ShapeSection(_Section):
    """What a synthetic row is made of; it is filled up with text.

    Attributes:
        width: tokens of a row.
        images, videos: how many of each.
        image, frame: height and width of an image, and of a clip's frame, in patches.
        frames: temporal patches of each clip.
    """

    width: Annotated[int, Field(ge=1)]
    images: Annotated[int, Field(ge=0)] = 0
    image: Sides = [16, 16]
    videos: Annotated[int, Field(ge=0)] = 0
    frames: Annotated[int, Field(ge=1)] = 1
    frame: Sides = [16, 16]


class DataSection(_Section):
    """Which rows it is trained on.

    Attributes:
        source: "demo" (photographs from packages), "synthetic" (made up, to measure with), a folder
            written by `Dataset.save_to_disk`, a `.parquet` or a `.jsonl` file.
        shape: of the rows of "synthetic".
        rows: rows of the demo to make; for another source, how many of its first rows are used.
            None: 80 of the demo, all of another source.
        processor: folder with the tokenizer, and the image processor's settings, for rows that are
            not tokenized yet. None: the model's folder, or the demo's own.
        min_pixels, max_pixels: what the image processor scales every image and frame into; None: as
            the processor has it.
        fps: frames per second of the clips of rows that do not say it themselves.
    """

    source: Annotated[str, AfterValidator(_data_source)] = DEMO
    shape: ShapeSection | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    processor: Annotated[str, AfterValidator(_folder)] | None = None
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0

    @model_validator(mode="after")
    def _synthetic_rows_have_a_shape(self) -> Self:
        if (self.source == SYNTHETIC) != (self.shape is not None):
            raise ValueError(f"data.shape belongs to data.source: {SYNTHETIC}, and only to it")
        return self


class DataLoaderSection(_Section):
    """Arguments of `torch.utils.data.DataLoader`.

    With `num_workers: 0` the last three have no meaning and are not passed on. `max_tokens` is no
    argument of it: batches are filled up to so many tokens by a `TokenBudgetSampler`, and
    `batch_size` has no meaning then.
    """

    batch_size: Annotated[int, Field(ge=1)] = 4
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    num_workers: Annotated[int, Field(ge=0)] = 2
    pin_memory: bool = False
    start_method: Literal["spawn", "fork", "forkserver"] = "spawn"
    persistent_workers: bool = True
    prefetch_factor: Annotated[int, Field(ge=1)] = 2


class RopeSection(_Section):
    """Whether the workers number the tokens, and by which release's rule.

    Attributes:
        enabled: False: the batch is left alone, and the model computes for itself.
        reference: a key of `REFERENCES`, or "auto"; see `resolve_reference`.
        vision: the vision tower's tensors are computed in the workers too.
        packing: "flatten" brings the examples of a batch into one row without padding.
        layout: "batch" puts the batch on dim 0 of `position_ids`; see `mrope.collate.layouts`.
        pad_to_multiple_of: a flattened row is filled up to a multiple of this.
        on_error: "skip" drops the examples that cannot be collated; see `mrope.collate.skip_bad`.
        rejects: JSON-lines file that gets a line for each of them.
        max_rejects: stop after more than so many in a worker, or than this share of its examples.
    """

    enabled: bool = True
    reference: Annotated[str, AfterValidator(_reference)] = "auto"
    vision: bool = False
    packing: Literal["flatten"] | None = None
    layout: Literal["model", "batch"] = "model"
    pad_to_multiple_of: Annotated[int, Field(ge=1)] = 1
    on_error: Literal["raise", "skip"] = "raise"
    rejects: Annotated[str, AfterValidator(_resolved)] | None = None
    max_rejects: Annotated[int | float, AfterValidator(_count_or_share)] | None = None

    @model_validator(mode="after")
    def _only_flattened_rows_are_filled_up(self) -> Self:
        if self.pad_to_multiple_of != 1 and self.packing is None:
            raise ValueError("rope.pad_to_multiple_of needs rope.packing: flatten")
        return self

    @model_validator(mode="after")
    def _rejects_are_of_skipping(self) -> Self:
        for name in ("rejects", "max_rejects"):
            if getattr(self, name) is not None and self.on_error != "skip":
                raise ValueError(f"rope.{name} needs rope.on_error: skip")
        return self


class TrainSection(_Section):
    """The loop.

    Attributes:
        steps: optimizer steps; the data is gone through as often as they need.
        seed: of the weights, the order of the rows, and the demo's rows.
        lr, weight_decay: of AdamW.
        device: "auto" is CUDA where there is one.
        dtype: of the weights.
        log_file: file for one JSON line per step.
    """

    steps: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    device: Literal["cpu", "cuda", "auto"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    log_file: Annotated[str, AfterValidator(_resolved)] | None = None


class Config(_Section):
    """A whole training config; made by `load_config`. Its paths are absolute or seen from here."""

    model: ModelSection
    data: DataSection = DataSection()
    dataloader: DataLoaderSection = DataLoaderSection()
    rope: RopeSection = RopeSection()
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _attached_models_need_the_stage(self) -> Self:
        if self.model.attach and self.rope.enabled and not self.rope.vision:
            raise ValueError("model.attach: true needs rope.vision: true")
        return self

    @model_validator(mode="after")
    def _budgets_are_for_flattened_rows(self) -> Self:
        if self.dataloader.max_tokens is not None and self.rope.packing is None:
            raise ValueError("dataloader.max_tokens needs rope.packing: flatten")
        return self

    def spec(self) -> MRopeSpec:
        """Return the spec of the model under the chosen reference; transformers is not imported.

        Raises:
            ConfigError: the model's config is not one of a known family, or not whole.
        """
        try:
            return MRopeSpec.from_config(self.model.config, self.rope.reference)
        except MRopeError as error:
            raise ConfigError(f"model.config: {error}") from error

    def vision_spec(self) -> VisionSpec | None:
        """Return the spec of the vision tower where its tensors are asked for, else None.

        Raises:
            ConfigError: mrope does not know the tower, or its config is not whole.
        """
        if not self.rope.vision:
            return None
        try:
            return VisionSpec.from_config(self.model.config)
        except MRopeError as error:
            raise ConfigError(f"model.config: {error}") from error
