"""Run small models twice, plain and with the stage, and compare logits, loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import numpy as np
import torch

from mrope.collate.collator import MRopeCollator
from mrope.collate.packing import Flatten
from mrope.collate.padding import PaddingCollator
from mrope.columns import count_key, tower_key
from mrope.errors import MRopeError
from mrope.hf.attaching import attach, base_model, detach
from mrope.hf.text import tells_text_row
from mrope.hf.thinkers import text_model
from mrope.proof.shrunken import build_model, shrink_config
from mrope.proof.tiny_examples import tiny_examples
from mrope.spec.references import resolve_reference
from mrope.spec.spec import MRopeSpec, example_config
from mrope.towers import AudioSpec, VisionSpec, audio_tokens

# What code that was written for another release raises, its imports included.
FAILURES = (
    MRopeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Frames that attend in one call, and merged projections, round differently in float32, which the
# gated delta nets of releases before 5.15 amplify to 2e-4 in a gradient.
_TOLERANCE = 3e-4
_MEL_FRAMES = (95, 131, 260)

Batch = dict[str, Any]
Side = Literal["left", "right"]
Step = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
Outcome = tuple[bool | None, str]


def small_copy(model: torch.nn.Module) -> Any:
    """Return a small model of the same class and config, unattached, with random weights.

    Raises:
        MRopeError: `model` holds no base model of a known family.
    """
    base = base_model(model)
    # The model with the head, which computes the loss; a base model alone has none.
    owner = next((one for one in model.modules() if getattr(one, "model", None) is base), base)
    attention = base.config._attn_implementation  # noqa: SLF001 - no public name
    return build_model(
        type(owner), shrink_config(owner.config), attention if attention == "eager" else "sdpa"
    )


def default_model(family: str) -> Any:
    """Return a small model of a family, from the default config of its class in transformers.

    Raises:
        ImportError, LookupError, ValueError: the installed transformers has no such model.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForTextToWaveform

    config = AutoConfig.for_model(family)
    for name, value in example_config(family).items():
        # The default configs of the Omni thinkers have no vision start marker, MiniCPM-V's no ids.
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    if family == "qwen3_omni_moe_thinker":
        # As its checkpoints have, and as its get_rope_index takes for granted up to 5.12.
        config.audio_config.n_window = 50
    autos = (AutoModelForImageTextToText, AutoModelForTextToWaveform)
    known = [auto._model_mapping for auto in autos]  # noqa: SLF001 - no public name
    # No auto class has GLM-Image.
    name = f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"
    model_class = next(
        (classes[type(config)] for classes in known if type(config) in classes),
        getattr(transformers, name, None),
    )
    if model_class is None:
        raise LookupError(f"no class for {family}")
    # HunYuan V4 VL has sinks, which sdpa does not take.
    attention = "sdpa" if model_class._supports_sdpa else "eager"  # noqa: SLF001
    return build_model(model_class, shrink_config(config), attention)


def compare_steps(model: object) -> Outcome:
    """Compare training steps of an attached model with those of the unmodified one.

    Raises:
        Exception: one of `FAILURES`, from the unmodified model: nothing was compared.
    """
    what = f"steps of a small {type(model).__name__}, plain and attached"
    for plain, staged in staged_batches(model):
        theirs = take_step(model, plain)
        difference = _try_step(model, staged, theirs, attached=True)
        if difference is not None:
            return False, f"{what}, differ: {difference}"
    return True, f"{what}: logits, loss and gradients are equal"


def staged_batches(model: Any) -> Iterator[tuple[Batch, Batch]]:
    """Yield batches of each media that a model takes together, without and with the stage.

    One of padded rows, and one of equal rows, which needs no padding and no mask.
    """
    specs = spec, vision, audio = _specs(model)
    sides: tuple[Side | None, ...] = ("left", None)
    for media, side in product(_media(spec), sides):
        plain = _plain_batch(model, specs, media, side)
        yield plain, dict(MRopeCollator(_return(plain), spec, vision, audio=audio)(None))


def compare_packing(model: Any) -> Outcome:
    """Compare steps on flattened batches with those on padded ones, plain and attached.

    Raises:
        Exception: one of `FAILURES`, from the unmodified model: nothing was compared.
    """
    what = f"a small {type(model).__name__} on padded and on flattened batches"
    # Linear layers keep borders only through kernels, and leak or raise where there are none.
    row = _specs(model)[0].family_row
    takes_rows = finds_borders(model) and not (row.linear or row.leaks)
    modes = ("plain", "attached") if takes_rows else ("attached",)
    for flat, padded in flattened_batches(model):
        theirs = take_step(model, padded)
        for mode in modes:
            difference = _try_step(model, flat, theirs, attached=mode == "attached")
            if difference is not None:
                return False, f"{what}, {mode}, differ: {difference}"
    return True, f"{what}, {' and '.join(modes)}: logits, loss and gradients are equal"


def finds_borders(model: Any) -> bool:
    """Whether the text model finds the borders of a flattened row in its position ids."""
    text = text_model(base_model(model))
    return _specs(model)[0].family_row.one_dimensional or tells_text_row(type(text))


def flattened_batches(model: Any) -> Iterator[tuple[Batch, Batch]]:
    """Yield a batch of each kind of media that a model takes together, flattened and padded."""
    specs = _specs(model)
    spec, vision, audio = specs
    for media in _media(spec):
        # Of a row padded on the left, the first token counts in the loss too, predicted by padding.
        given = _return(_plain_batch(model, specs, media, "right"))
        packing = Flatten(attached=True)  # under sdpa the unmodified model takes it too
        flat = MRopeCollator(given, spec, vision, audio=audio, packing=packing)(None)
        yield dict(flat), dict(MRopeCollator(given, spec, vision, audio=audio)(None))


def _specs(model: Any) -> tuple[MRopeSpec, VisionSpec, AudioSpec | None]:
    config = model.config
    # Not "auto": that would compare positions first, which is another feature.
    spec = MRopeSpec.from_config(config, resolve_reference())
    has_audio = "audio_seqlens" in spec.family_row.inputs
    audio = AudioSpec.from_config(config) if has_audio else None
    return spec, VisionSpec.from_config(config), audio


def _media(spec: MRopeSpec) -> list[dict[str, bool]]:
    """Return the kinds of media that the unmodified model takes in one batch."""
    if spec.family_row.frames_as_images:
        # transformers counts a clip's frames among the images, and refuses both together.
        return [{"images": True, "videos": False}, {"images": False, "videos": True}]
    tower = spec.family_row.tower
    return [{"images": True, "videos": tower is not None and tower.videos}]


def _plain_batch(
    model: Any,
    specs: tuple[MRopeSpec, VisionSpec, AudioSpec | None],
    media: dict[str, bool],
    padding_side: Side | None = "left",
) -> Batch:
    """Return three padded rows: media of both kinds, only text, and media; Omnis have audio too.

    Without a side to pad on: the first row twice.
    """
    spec, _, audio = specs
    examples = tiny_examples(model.config.to_dict(), spec, **media)
    lengths: tuple[int, ...] = _MEL_FRAMES
    if padding_side is None:
        padding_side, lengths = "left", _MEL_FRAMES[:1] * 2
        examples = [dict(examples[0]) for _ in lengths]
    if audio is None:
        joined = _take_crops(examples) if spec.family_row.custom_index == "minicpm" else {}
        batch = dict(PaddingCollator(padding_side=padding_side)(examples)) | joined
        if spec.family_row.custom_index == "glm_image":
            grids = tower_key("image", "grid_thw")
            batch[count_key("image")] = torch.tensor([len(one[grids]) for one in examples])
        return batch
    for example, frames in zip(examples, lengths, strict=True):
        _append_audio(example, spec, audio, frames)
    batch = dict(PaddingCollator(padding_side=padding_side)(examples))
    return batch | _sounds(model, batch, lengths)


def _sounds(model: Any, batch: Batch, lengths: tuple[int, ...]) -> Batch:
    """Return what a thinker's processor adds beside tokens and pixels, for audios of mel frames."""
    # The thinkers' own function takes no token types.
    batch.pop("mm_token_type_ids", None)
    frames_N = torch.tensor(lengths)
    shape = (len(frames_N), model.config.audio_config.num_mel_bins, max(lengths))
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < frames_N[:, None]
    return {
        "video_second_per_grid": torch.full((len(batch["video_grid_thw"]),), 0.5),
        "input_features": torch.randn(shape, generator=generator),
        "feature_attention_mask": mask.long(),
    }


def _take_crops(examples: list[Batch]) -> Batch:
    """Remove the pixels of MiniCPM-V's examples, and return those of the batch."""
    names = [name for name in ("pixel_values", "pixel_values_videos") if name in examples[0]]
    taken = {name: [one.pop(name) for one in examples if name in one] for name in names}
    return {name: torch.from_numpy(np.concatenate(parts, axis=-1)) for name, parts in taken.items()}


def _append_audio(example: Batch, spec: MRopeSpec, audio: AudioSpec, frames: int) -> None:
    count = int(audio_tokens(audio, np.array([frames]))[0])
    start, token = (int(spec.extra[f"audio_{name}"]) for name in ("start_token_id", "token_id"))
    tokens = np.array([start, *[token] * count, 20, 21])
    example["input_ids"] = np.concatenate((example["input_ids"], tokens))
    example["labels"] = np.concatenate((example["labels"], np.where(tokens == token, -100, tokens)))
    types = example["mm_token_type_ids"]
    example["mm_token_type_ids"] = np.concatenate((types, np.zeros_like(tokens)))


def _return(batch: Batch) -> Any:
    return lambda _: dict(batch)


def take_step(model: Any, batch: Batch) -> Step:
    """Return logits of valid tokens and the loss, and the gradient of every parameter."""
    model.zero_grad()
    output = model(**batch)
    logits = output[0] if output.get("logits") is None else output.logits
    loss = logits.square().mean() if output.get("loss") is None else output.loss
    loss.backward()
    mask = batch.get("attention_mask")
    valid = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
    gradients = {
        f"gradient of {name}": one.grad.clone()
        for name, one in model.named_parameters()
        if one.grad is not None
    }
    return {"logits": valid.detach(), "loss": loss.detach()}, gradients


def _try_step(model: Any, batch: Batch, expected: Step, attached: bool) -> str | None:
    """Run a step; describe the first difference from the expected one, or what was raised."""
    try:
        if not attached:
            return describe_difference(take_step(model, batch), expected)
        # Not strict: whatever the class has become, it is compared.
        ours = take_step(attach(model, strict=False), batch)
        detach(model)
    except FAILURES as error:
        return f"the {'attached' if attached else 'plain'} model raised {describe_error(error)}"
    return describe_difference(ours, expected)


def describe_error(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def describe_difference(ours: Step, theirs: Step) -> str | None:
    """Describe the first value that differs; None if all are equal within rounding."""
    mine, own = ({**outputs, **gradients} for outputs, gradients in (ours, theirs))
    for name in [*own, *(mine.keys() - own.keys())]:
        if name not in own or name not in mine:
            return f"only one of them has a {name}"
        if mine[name].shape != own[name].shape:
            return f"{name} have shapes {tuple(mine[name].shape)} and {tuple(own[name].shape)}"
        apart = (mine[name] - own[name]).abs().max().item()
        # Not `>`, which a nan passes.
        if not apart <= _TOLERANCE * max(1.0, own[name].abs().max().item()):
            return f"{name} by up to {apart:.3g}"
    return None
