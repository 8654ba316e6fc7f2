"""Open the rows that a config's `data` section names, and make the DataLoader over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mrope.collate.collator import Collate
from mrope.collate.read import PIXELS
from mrope.collate.skip_bad import Indexed
from mrope.columns import COLUMNS, NewColumns, columns
from mrope.errors import MRopeError
from mrope.prepare.ranks import find_rank
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.prepare.streams import TokenBudgetStream
from mrope.prepare.with_accelerate import EpochsInTurn
from mrope.prepare.work import WorkModel
from mrope.training.open_source import open_source, split_source
from mrope.training.rows import Rows, count_example, start_worker
from mrope.training.sizes import file_of_sizes
from mrope.training.synthetic import SyntheticRows, patch_shape

if TYPE_CHECKING:
    import datasets

    from mrope.spec.spec import MRopeSpec
    from mrope.training.conversations import Conversations
    from mrope.training.sections import Config

_DEMO_ROWS = 80
GRIDS = tuple(name for name in columns("item", means="size") if COLUMNS[name].sides == 3)
CROPS = tuple(name for name in columns("item", means="size") if COLUMNS[name].sides == 2)
_COLUMNS = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", *PIXELS, *GRIDS)
_SECONDS, _EXPERT_TYPES = "second_per_grid_ts", "moe_mm_token_type_ids"
_ALSO_SECONDS = "video_second_per_grid"  # which the collator reads, and no forward

RowDataset = Rows | SyntheticRows


def load_rows(cfg: Config) -> RowDataset:
    """Open or make the dataset that a config names; no row is prepared before a batch needs it.

    Raises:
        ConfigError: the model's config is not usable.
        MRopeError: the dataset cannot be read, or has neither token columns nor conversations, or
            the model's processor cannot be loaded.
    """
    from mrope.training.model import load_model_config

    spec, model_config = cfg.spec(), load_model_config(cfg)
    if cfg.data.shape is not None:
        vision = model_config.vision_config
        dtype = getattr(torch, cfg.model.dtype)
        rows = cfg.data.rows or _DEMO_ROWS
        return SyntheticRows(spec, cfg.data.shape, rows, patch_shape(spec, vision), dtype)
    table = open_table(cfg)
    conversations = None
    if "input_ids" in table.column_names:
        table = _tokenized(table, spec)
    else:
        conversations = open_conversations(cfg, spec, model_config)
    return Rows(table, spec, conversations, _sizes_file(cfg, conversations))


def open_table(cfg: Config) -> datasets.Dataset:
    """Open or make the table that a config names, without preparing its rows.

    Raises:
        MRopeError: the table cannot be read, or has neither `input_ids` nor `messages`.
    """
    if cfg.data.source == "demo":
        # Imports datasets and PIL, which workers do without.
        from mrope.training.demo.dataset import photographs

        table = photographs(cfg.data.rows or _DEMO_ROWS, cfg.seed)
    else:
        table = open_source(cfg.data.source)
        table = table.select(range(min(cfg.data.rows or len(table), len(table))))
    names = table.column_names
    if not {"input_ids", "messages"} & set(names):
        raise MRopeError(
            f"data.source: {cfg.data.source} has the columns {', '.join(names)}; a dataset needs "
            "input_ids and labels, or messages"
        )
    return table


def open_conversations(cfg: Config, spec: MRopeSpec, model_config: Any) -> Conversations:
    """Return what prepares rows of `messages`; its processor is loaded, to find faults early.

    Raises:
        MRopeError: the processor cannot be loaded, or is not the model's; or a path of a model
            without one. The demo's would fit many a model's ids, and count other tokens.
    """
    from mrope.training.conversations import Conversations
    from mrope.training.processor import check_processor

    folder = processor_folder(cfg)
    if folder is None and isinstance(cfg.model.config, str) and cfg.data.source != "demo":
        raise MRopeError(
            f"no tokenizer_config.json beside the model's config, {cfg.model.config}: messages "
            "need its processor; save it there, or give its folder as data.processor"
        )
    vision = model_config.vision_config
    sides = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size"}
    sides["merge_size"] = "spatial_merge_size"
    source = split_source(cfg.data.source)[0]
    made = Conversations(
        spec,
        cfg.data,
        source=folder,
        # Relative paths of pictures begin at the dataset's folder.
        pictures=source if source.is_dir() else source.parent,
        model_type=model_config.model_type,
        patches={name: int(getattr(vision, side, 1)) for name, side in sides.items()},
        trust_remote_code=cfg.model.trust_remote_code,
    )
    whose = f"the processor in {folder}"
    if folder is None:
        whose = "no processor is given (data.processor, or the model's folder), and the demo's"
    check_processor(made.processor, whose, spec, model_config)
    return made


def make_loader(cfg: Config, rows: RowDataset, collate: Collate) -> DataLoader[Any]:
    """Make the DataLoader of a config over rows of `load_rows`, shuffled by `trainer.seed`.

    Without `dataloader.max_tokens` an incomplete last batch is dropped; with it, the loader has as
    many batches in every epoch, see `EpochsInTurn`.

    Raises:
        MRopeError: fewer rows than one batch takes, or a row above the token budget.
    """
    options = cfg.dataloader
    table = indexed(cfg, rows)
    if options.max_tokens is not None and options.buffer_size is not None:
        stream = _make_stream(cfg, table, options.max_tokens, options.buffer_size)
        return DataLoader(stream, batch_size=None, **_loader_options(cfg, collate))
    if options.max_tokens is not None:
        sampler = EpochsInTurn(make_sampler(cfg, rows, options.max_tokens))
        return DataLoader(table, batch_sampler=sampler, **_loader_options(cfg, collate))
    require_a_batch(cfg, rows)
    return DataLoader(
        table,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(cfg.seed),
        **_loader_options(cfg, collate),
    )


def indexed(cfg: Config, rows: RowDataset) -> Any:
    """Return rows with their index, under which the rejects file names them, if it may."""
    return Indexed(rows) if cfg.rope.on_error == "skip" else rows


def require_a_batch(cfg: Config, rows: RowDataset) -> None:
    """Raise an `MRopeError` if there are fewer rows than `dataloader.batch_size`."""
    size = cfg.trainer.get("per_device_train_batch_size", cfg.dataloader.batch_size)
    if len(rows) < size:
        raise MRopeError(f"dataloader.batch_size is {size}, but there are only {len(rows)} rows")


def make_sampler(cfg: Config, rows: RowDataset, max_tokens: int) -> TokenBudgetSampler:
    """Make the batch sampler of a config with `dataloader.max_tokens`; raises as it does."""
    shapes = cfg.rope.shapes
    ladder = shapes.ladder() if shapes is not None and cfg.rope.enabled else None
    has_rungs = ladder is not None and bool(ladder.patches)
    sizes = rows.sizes(cfg.dataloader.num_workers, skip=cfg.rope.on_error == "skip")
    by_work = cfg.dataloader.balance == "work"
    asked = {"patches": needs_patches(cfg) or has_rungs, "segments": has_rungs}
    counts: NewColumns = {
        name: sizes[name]
        for name, is_asked in {**asked, "patch_pairs": by_work}.items()
        if is_asked
    }
    return TokenBudgetSampler(
        sizes["tokens"], max_tokens, **counts, **sampler_options(cfg), shapes=ladder
    )


def needs_patches(cfg: Config) -> bool:
    """Return whether the sampler of a config counts patches, whatever its ladder."""
    return cfg.dataloader.max_patches is not None or cfg.dataloader.balance == "work"


def sampler_options(cfg: Config) -> NewColumns:
    """Return the arguments of a config's sampler that neither rows nor ladder decide."""
    by_work = cfg.dataloader.balance == "work"
    return {
        "max_patches": cfg.dataloader.max_patches,
        "cost": WorkModel.from_config(cfg.model.config) if by_work else None,
        # The filled-up row must fit into the budget too.
        "pad_to_multiple_of": cfg.rope.pad_to_multiple_of,
        "seed": cfg.seed,
    }


class _Endless(IterableDataset[Any]):
    """Read streams epoch after epoch, without an end: all ranks take as many steps.

    Each worker makes a stream of its own, since they share the epoch of one.
    """

    def __init__(self, make: Callable[[], TokenBudgetStream]) -> None:
        self.make = make
        make()  # raises for arguments that are wrong

    def __iter__(self) -> Iterator[Any]:
        stream = self.make()
        for epoch in count():
            stream.set_epoch(epoch)
            empty = True
            for batch in stream:
                empty = False
                yield batch
            if empty:
                raise MRopeError("a worker has no row: use fewer dataloader.num_workers, or ranks")


def _make_stream(cfg: Config, rows: Any, max_tokens: int, buffer_size: int) -> _Endless:
    """Make the stream of batches of a config with `dataloader.buffer_size`."""
    # Found here: a worker that is started anew knows no ranks.
    rank, ranks = find_rank(None, None)
    options = sampler_options(cfg)
    del options["cost"]
    return _Endless(
        partial(
            TokenBudgetStream,
            rows,
            max_tokens,
            **options,
            buffer_size=buffer_size,
            size=partial(count_example, cfg.spec()),
            rank=rank,
            num_replicas=ranks,
        )
    )


def _loader_options(cfg: Config, collate: Collate) -> NewColumns:
    options = cfg.dataloader
    given = {
        "num_workers": options.num_workers,
        "pin_memory": options.pin_memory,
        "collate_fn": collate,
    }
    # A DataLoader without workers raises if it is given any of these.
    if options.num_workers:
        given |= {
            "multiprocessing_context": options.start_method,
            "persistent_workers": options.persistent_workers,
            "prefetch_factor": options.prefetch_factor,
            "worker_init_fn": partial(start_worker, None),
        }
    return given


def _sizes_file(cfg: Config, conversations: Conversations | None) -> Path | None:
    if cfg.data.source == "demo":
        return None
    words: list[object] = [cfg.data.source, cfg.data.rows, cfg.spec().family]
    if conversations is not None:
        import transformers

        processor = conversations.processor
        sides = cfg.data.min_pixels, cfg.data.max_pixels, cfg.data.fps
        words += [transformers.__version__, *sides, processor.to_dict(), processor.chat_template]
        words.append(len(processor.tokenizer))
    return file_of_sizes(split_source(cfg.data.source)[0], words)


def processor_folder(cfg: Config) -> str | None:
    """Return `data.processor`, or the config's folder if it holds a tokenizer, else None."""
    config = cfg.model.config
    if cfg.data.processor is not None:
        return cfg.data.processor
    if not isinstance(config, str):
        return None
    folder = Path(config) if Path(config).is_dir() else Path(config).parent
    return str(folder) if (folder / "tokenizer_config.json").is_file() else None


def _tokenized(table: datasets.Dataset, spec: MRopeSpec) -> datasets.Dataset:
    """Check the columns of a tokenized dataset, and keep those that the model reads."""
    names = set(table.column_names)
    if "labels" not in names:
        raise MRopeError(
            "data.source: the dataset has input_ids but no labels, so there is no loss"
        )
    crops = spec.family_row.tower is not None and spec.family_row.tower.sizes == "crops"
    # Checked here, once: the collator would raise the same for every row.
    for pixels, grid in zip(PIXELS, CROPS if crops else GRIDS, strict=True):
        if (pixels in names) != (grid in names):
            have, lack = (pixels, grid) if pixels in names else (grid, pixels)
            raise MRopeError(f"data.source: the dataset has {have} but no {lack}")
    if _ALSO_SECONDS in names and _SECONDS not in names:
        table = table.rename_column(_ALSO_SECONDS, _SECONDS)
    # A model's forward refuses keywords that it does not know.
    wanted = dict.fromkeys(model_columns(spec))
    return table.select_columns([name for name in wanted if name in table.column_names])


def model_columns(spec: MRopeSpec) -> tuple[str, ...]:
    """Return the names of the columns that a model of the family reads."""
    row = spec.family_row
    own = [name for name in row.inputs if not name.endswith("_per_sample")]
    if row.timed:
        own.append(_SECONDS)
    if row.tower is not None and "pairs" in row.tower.tensors:
        # Without it ERNIE's forward sends images to the experts of text, without an error.
        own.append(_EXPERT_TYPES)
    return (*_COLUMNS, *own)
