"""Add position ids to the batches of lmms-engine's datasets, switched on in its YAML.

Importing this module registers `mrope_<name>` beside each `<name>` in lmms-engine's registry of
datasets. Nothing else in this package imports it: it imports lmms-engine, and with it transformers.

    torchrun ... -m mrope.transforms.lmms_engine config_yaml=train.yaml

is lmms-engine's own launcher, started after that import. Read from lmms-engine 0.1.4:
`lmms_engine/mapping_func.py`, `lmms_engine/train/runner.py`, `lmms_engine/datasets/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# Its datasets register themselves when their package is imported.
import lmms_engine.datasets  # noqa: F401
from lmms_engine.mapping_func import DATASET_MAPPING

from mrope.collate.collator import Collate, MRopeCollator
from mrope.columns import Columns
from mrope.errors import MRopeError
from mrope.spec.references import nearest
from mrope.spec.spec import MRopeSpec

PREFIX = "mrope_"
SECTION = "dataset_config.extra_kwargs.mrope"


@dataclass(frozen=True)
class Options:
    """Options in the section `dataset_config.extra_kwargs.mrope` of lmms-engine's YAML.

    `extra_kwargs` is the one section whose keys lmms-engine leaves to others: its config class
    drops unknown keys of `dataset_config` without a message.

    Args:
        model: the model's config: a mapping with `model_type`, the path of a `config.json` or of
            its folder, or a name on the Hub. None: the processor's `processor_name`.
        reference: see `mrope.spec.resolve_reference`. lmms-engine's own rope functions follow the
            default with every release of transformers.
        on_error: "raise", or "skip" to drop examples that cannot be collated.
        rejects, max_rejects, max_rejects_in_a_row, count_key: see `mrope.collate.SkipBad`; require
            `on_error: skip`.
    """

    model: Columns | str | None = None
    reference: str = "transformers-4.57"
    on_error: str = "raise"
    rejects: str | None = None
    max_rejects: float | None = None
    max_rejects_in_a_row: int | None = 100
    count_key: str | None = None

    @classmethod
    def read(cls, section: object) -> Options:
        """Return the options of a section; None: the defaults.

        Raises:
            MRopeError: not a mapping, or an unknown option, which is named.
        """
        section = {} if section is None else section
        if not isinstance(section, Mapping):
            raise MRopeError(f"{SECTION} must be a mapping, not {type(section).__name__}")
        known = [field.name for field in fields(cls)]
        for name in section:
            if name not in known:
                raise MRopeError(
                    f"{SECTION}: unknown option {name!r}{nearest(str(name), known)}; "
                    f"known: {', '.join(known)}"
                )
        return cls(**section)

    def spec(self, processor_name: str) -> MRopeSpec:
        """Return the spec of `model`, or of the model that the processor was saved with.

        Raises:
            MRopeError: no config there, an unknown family or reference, or a key that the config
                lacks.
            OSError: neither a local path nor a name that can be fetched from the Hub.
        """
        config = processor_name if self.model is None else self.model
        if isinstance(config, str):
            from transformers import PretrainedConfig

            # Not `AutoConfig`, which has no class for aero_realtime. Empty if the folder or the
            # repository has no config.json.
            found = PretrainedConfig.get_config_dict(config)[0]
            if "model_type" not in found:
                raise MRopeError(
                    f"no model config at {config}; give the model's as {SECTION}.model"
                )
            config = found
        return MRopeSpec.from_config(config, self.reference)

    def wrap(self, inner: Collate | None, spec: MRopeSpec) -> MRopeCollator:
        """Return the stage around lmms-engine's collator.

        Raises:
            ValueError: `on_error` or one of the options that belong to it has a wrong value.
        """
        names = ("rejects", "max_rejects", "max_rejects_in_a_row", "count_key")
        skipping = {name: getattr(self, name) for name in names}
        return MRopeCollator(inner, spec, on_error=self.on_error, **skipping)  # type: ignore[arg-type]


def register_datasets() -> list[str]:
    """Register `mrope_<name>` for each dataset that is registered, and return the new names.

    Importing this module calls it; call it again after registering datasets of your own.
    """
    names = [
        name
        for name in DATASET_MAPPING
        if not name.startswith(PREFIX) and PREFIX + name not in DATASET_MAPPING
    ]
    for name in names:
        DATASET_MAPPING[PREFIX + name] = with_positions(DATASET_MAPPING[name])
    return [PREFIX + name for name in names]


def with_positions(dataset: Any) -> type:
    """Return a subclass of one of lmms-engine's datasets whose collator adds position ids.

    Args:
        dataset: a class with `config`, `processor_config` and `get_collator`, as subclasses of
            lmms-engine's `BaseDataset` and `BaseIterableDataset` have.

    Returns:
        The subclass. Its constructor reads the options and the model's config, so that an error in
        them is raised before data is loaded.
    """

    def construct(self: Any, config: Any) -> None:
        dataset.__init__(self, config)
        self.mrope_options = Options.read(config.extra_kwargs.get("mrope"))
        self.mrope_spec = self.mrope_options.spec(self.processor_config.processor_name)
        # Wrong values raise here: lmms-engine asks for the collator only after it loaded the data.
        self.mrope_options.wrap(None, self.mrope_spec)

    def get_collator(self: Any) -> MRopeCollator:
        inner = dataset.get_collator(self)
        options: Options = self.mrope_options
        return options.wrap(inner, self.mrope_spec)

    name = f"MRope{dataset.__name__}"
    members = {
        "__init__": construct,
        "get_collator": get_collator,
        "__module__": __name__,
        "__doc__": f"`{dataset.__name__}` of lmms-engine, with position ids in its batches.",
    }
    # An attribute of this module, so that spawned workers can unpickle the dataset by its name.
    made = globals()[name] = type(name, (dataset,), members)
    return made


register_datasets()
