"""Find the tokens of the assistant's turns, as a model's chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mrope.columns import Columns
from mrope.errors import MRopeError

Messages = Sequence[Mapping[str, Any]]


def answer_tokens(
    spans: Sequence[tuple[int, int]], offsets_N2: torch.Tensor, replaced: Sequence[Any]
) -> torch.Tensor:
    """Return which tokens belong to spans of a text, bool (N,).

    Args:
        spans: start and end of each, in the text before its placeholders were replaced.
        offsets_N2: start and end of each token in the text afterwards.
        replaced: for each placeholder its `span` before, and its `new_span`.
    """
    chosen_N = torch.zeros(len(offsets_N2), dtype=torch.bool)
    for span in spans:
        start, end = (_moved(place, replaced) for place in span)
        chosen_N |= (offsets_N2[:, 0] < end) & (offsets_N2[:, 1] > start)
    return chosen_N


def answer_spans(processor: Any, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Return where the assistant's turns stand in the text of a conversation.

    A template with `{% generation %}` says it itself. With any other, a turn begins where the
    generation prompt of the turns before it ends.

    Raises:
        MRopeError: there is no such turn, or the template writes a turn differently before others.
    """
    template = processor.chat_template
    if isinstance(template, str) and re.search(r"\{%-?\s*generation\b", template):
        found = _marked_spans(processor, messages)
    else:
        found = _spans_by_prefixes(processor.apply_chat_template, messages, text)
    if not found:
        raise MRopeError("data.loss: answers: the row has no turn of the assistant")
    return found


def _marked_spans(processor: Any, messages: Messages) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in spans[0]]


def _spans_by_prefixes(
    render: Callable[..., str], messages: Messages, text: str
) -> list[tuple[int, int]]:
    found = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], add_generation_prompt=True) if number else ""
        upto = render(messages[: number + 1])
        # A template without a generation prompt does not say where the answer itself begins.
        told = before and before != render(messages[:number])
        if not told or not text.startswith(before) or not text.startswith(upto):
            raise MRopeError(
                f"data.loss: answers: the chat template does not tell where message {number} "
                "stands, since it writes it differently with other turns behind it; give a "
                "template with {% generation %}"
            )
        found.append((len(before), len(upto)))
    return found


def _moved(place: int, replaced: Sequence[Columns]) -> int:
    """Return where a place of a text stands after its placeholders were replaced."""
    gained = [one["new_span"][1] - one["span"][1] for one in replaced if one["span"][1] <= place]
    return place + (gained[-1] if gained else 0)
