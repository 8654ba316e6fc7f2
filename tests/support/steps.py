"""Batches without and with what the collator adds, and steps of a model on either.

Imports transformers: only tests that need a live model import this module.
"""

from __future__ import annotations

from typing import Any

import torch

from mrope import MRopeCollator
from mrope.collate.padding import PaddingCollator
from mrope.guard import SyncGuard
from mrope.hf import attach, detach
from mrope.towers import VisionSpec
from support.models import media_of, model_config, tiny_examples, tiny_spec

MEDIA = {
    "images": {"images": True, "videos": False},
    "videos": {"images": False, "videos": True},
    "both": {"images": True, "videos": True},
    "text": {"images": False, "videos": False},
}
Batch = dict[str, Any]
Step = tuple[Any, dict[str, torch.Tensor]]


def tensor_collator(family: str, inner: Any = None) -> MRopeCollator:
    vision = VisionSpec.from_config(model_config(family))
    return MRopeCollator(inner, tiny_spec(family), vision)


def make_batches(
    family: str, media: dict[str, bool] | None = None, padded: bool = True
) -> tuple[Batch, Batch]:
    """Return what an inner collate function makes, and the same from a collator with vision.

    Args:
        media: of `MEDIA`; None: the first that one batch of the unmodified model can hold.
        padded: rows of different lengths, padded on the left.
    """
    media = media or media_of(family)[0]
    examples = tiny_examples(family, **media)
    if not padded:
        examples = [examples[0]] * 2
    inner = PaddingCollator(padding_side="left")
    plain, batch = inner(examples), tensor_collator(family, inner)(examples)
    if family == "glm_image":
        for one in (plain, batch):
            del one["mm_token_type_ids"]  # its processor makes none
            one["images_per_sample"] = torch.tensor([len(e["image_grid_thw"]) for e in examples])
    elif "rope_deltas" in batch and not any(media.values()):
        # Left to itself, transformers 5 numbers such a batch without looking at the mask.
        plain["position_ids"] = batch["position_ids"]
    return plain, batch


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(**batch).logits
    return logits


def step(model: torch.nn.Module, batch: Batch) -> Step:
    """Return the output of a training step and the gradients of every parameter."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    named = model.named_parameters()
    return output, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same_step(ours: Step, theirs: Step, atol: float = 0.0) -> None:
    """Outputs and gradients are equal: to the last bit, where no tolerance is given."""
    (output, gradients), (own_output, own_gradients) = ours, theirs
    torch.testing.assert_close(output.logits, own_output.logits, rtol=0, atol=atol)
    torch.testing.assert_close(output.loss, own_output.loss, rtol=0, atol=atol)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - own_gradients[name]).abs().max().item()
        assert difference <= atol, f"{name} differs by {difference}"


def assert_attached_as_plain(model: Any, plain: Batch, batch: Batch, atol: float = 0.0) -> None:
    """The same step, attached and plain: no sync where attached, and nothing left once detached."""
    theirs = step(model, plain)
    assert_same_step(step(model, batch), theirs)  # the unmodified model takes the batch too
    attach(model)
    with SyncGuard() as guard:
        ours = step(model, batch)
    assert guard.count == 0, guard.report()
    assert_same_step(ours, theirs, atol)
    detach(model)
    assert torch.equal(logits_of(model, plain), theirs[0].logits)
