"""axolotl's plug-in: `plugins: [mrope.transforms.axolotl.MRopePlugin]` in its YAML calls `equip`.

Nothing else in this package imports it: it imports axolotl. Read from axolotl 0.19.0:
`axolotl/train.py`, `axolotl/integrations/base.py`, `axolotl/core/builders/causal.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from mrope.columns import NewColumns
from mrope.hf.equip import equip

if TYPE_CHECKING:
    from axolotl.core.trainers.base import AxolotlTrainer


class MRopeArgs(BaseModel):
    """The key `mrope` of axolotl's YAML: keywords of `mrope.hf.equip`, all of them optional."""

    mrope: dict[str, object] = {}


class MRopePlugin(BasePlugin):  # type: ignore[misc]
    """Put the stage into axolotl's trainer once it is made, before its model is wrapped."""

    def get_input_args(self) -> str:
        """Return the path of `MRopeArgs`, by which axolotl extends its schema."""
        return f"{__name__}.{MRopeArgs.__name__}"

    def post_trainer_create(self, cfg: NewColumns, trainer: AxolotlTrainer) -> None:
        """Call `equip(trainer)` with the keywords of the YAML; see there for what it raises."""
        equip(trainer, **cfg["mrope"])
