"""FSDP2 gathers a module in the hooks around its forward: an attached model runs each part's own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf import test_crop_forwards
from mrope.hf import attach
from mrope.hf.attaching import base_model
from mrope.hf.rows import ROWS
from support.models import LIVE_FAMILIES, PLAIN_FAMILIES, SIZED_FAMILIES, tiny_model
from support.steps import make_batches

FAMILIES = [one for one in (*LIVE_FAMILIES, *PLAIN_FAMILIES, *SIZED_FAMILIES) if one in ROWS]


# Outputs of some towers are views.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_may_be_sharded_on_its_own(family: str) -> None:
    crops = family == test_crop_forwards.FAMILY
    _, batch = test_crop_forwards.make_batches(padded=True) if crops else make_batches(family)
    whole = attach(tiny_model(family).train())
    expected = whole(**dict(batch)).loss
    mesh = init_device_mesh("cpu", (1,))
    parts = {name for name, part in base_model(whole).named_children() if [*part.parameters()]}
    # Unmodified models, too, run parts of these outside of their forwards.
    for name in sorted(parts - {"language_model", "vqmodel"}):
        model = attach(tiny_model(family).train())
        fully_shard(getattr(base_model(model), name), mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(**dict(batch)).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, msg=name)
