"""The forward of an attached base model, which takes everything from the batch and never syncs.

It replaces the `forward` of a transformers base model (the module that holds the vision tower and
`language_model`), for batches of a `MRopeCollator` with vision tensors. It runs transformers'
operations in transformers' order wherever possible. What differs is where a decision is made:

- Features go to their tokens by index (`image_scatter_index`); transformers compresses a mask.
- Towers attend within segments whose lengths are host ints (`image_split_sizes`), and equal ones
  together; transformers reads `cu_seqlens` back, three times a layer, and loops.
- A host bool (`has_padding`) decides the attention mask; transformers reduces the mask.
- The worker matched placeholders and features; transformers counts both again.

What differs between base models is in their rows: `mrope.hf.rows`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.columns import Columns, NewColumns
from mrope.hf.compiling import decodes, refuse_many_shapes
from mrope.hf.generation import is_generating, while_generating
from mrope.hf.inputs import Tensors, is_precomputed, modalities_of, token_embeddings
from mrope.hf.outputs import Encoded, own_output
from mrope.hf.rows import Row, row_of
from mrope.hf.scatter import Level, deepstack_inputs, scatter_features
from mrope.hf.thinkers import holds_head, text_to_run


@can_return_tuple  # type: ignore[untyped-decorator]
def attached_forward(self: Any, **inputs: Any) -> Any:
    """Run the towers on what the batch has of media, and the text model on the embeddings.

    A batch without what the stage adds goes to the model's own forward.

    Raises:
        MRopeError: such a batch has media, and the model is strict; or as `refuse_many_shapes`.
    """
    if getattr(self, "mrope_strict", None) is None:
        # Detached beneath a wrapper that goes on to call this forward.
        return type(self).forward(self, **inputs)
    inputs = dict(to_model_layout(inputs))
    inputs |= given_by_head(inputs)
    if getattr(self, "mrope_shapes", None) is None or is_generating():
        return _run(self, inputs)
    if decodes(self, inputs):
        with while_generating():  # by a loop of the caller's
            return _run(self, inputs)
    refuse_many_shapes(self, inputs)
    return _run(self, inputs | {"use_cache": False})


def _run(self: Any, inputs: NewColumns) -> Any:
    row = row_of(self.config.model_type)
    if not is_precomputed(self, inputs, row.audio):
        return type(self).forward(self, **inputs)
    embeds, encoded, levels = embed_media(self, row, inputs)
    if levels:
        inputs |= deepstack_inputs(levels)
    deltas = inputs.pop("rope_deltas", None)
    if deltas is not None:
        self.rope_deltas = deltas  # where transformers' generate looks for it
    outputs = row.text(text_to_run(self, inputs), embeds, inputs)
    return outputs if holds_head(self) else own_output(self, outputs, encoded)


def embed_media(
    self: object, row: Row, inputs: Tensors
) -> tuple[torch.Tensor, dict[str, Encoded], list[Level]]:
    """Embed tokens, and put the features of images, clips and audios in the places of theirs.

    Removes from `inputs` what it uses.

    Returns:
        Embeddings (B, S, hidden); what the towers returned, by modality; and the features of their
        deeper layers with their places.
    """
    encoded = {} if row.before is None else row.before(self, inputs)
    embeds = token_embeddings(self, inputs)
    levels = []
    for modality in modalities_of(inputs):
        places, encoded[modality] = row.encode(self, row, modality, inputs)
        output = encoded[modality].output
        embeds = scatter_features(embeds, places, output.pooler_output)
        deeper = getattr(output, "deepstack_features", None)
        if deeper is not None:
            levels.append((places, deeper))
    return embeds, encoded, levels


def given_by_head(inputs: Columns) -> NewColumns:
    """Return what a head that embeds by itself has put beside the positions of a batch."""
    given: NewColumns = getattr(inputs.get("position_ids"), "mrope_given", {})
    return given
