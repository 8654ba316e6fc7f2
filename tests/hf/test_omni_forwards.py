"""Attached Omni thinkers: audio, images and videos with audio; same results, and no syncs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", "5.23")

from mrope import MRopeCollator, MRopeError, MRopeSpec, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.hf.attaching import detach
from mrope.towers import AudioSpec, audio_tokens
from mrope.training.step import guarded_step
from positions.custom.test_omni import BINS, thinker_class, tiny_thinker
from support.steps import step

FAMILIES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
START, IMAGE, VIDEO, AUDIO, AUDIO_START, END = 101, 102, 103, 104, 105, 98
MELS = 260
KINDS = ("audio", "image", "video", "all", "text")


def make_model(family: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = tiny_thinker(family).config
    return thinker_class(family)._from_config(config, attn_implementation=attention).train()


def make_batches(family: str, kind: str, padded: bool) -> tuple[dict[str, Any], Any]:
    """Return what a processor gives, and the same with all that the stage adds."""
    model = tiny_thinker(family)
    tower = AudioSpec.from_config(model.config)
    generator = torch.Generator().manual_seed(0)
    rows, media = [], _Media(model.config, tower)
    for number in range(2):
        row = [7, 8]
        row += media.image() if kind in ("image", "all") else []
        row += media.audio(95 + 40 * number) if kind in ("audio", "all") else []
        row += media.video(130) if kind in ("video", "all") else []
        rows.append(row + [9] * (4 if padded else 1) if number == 0 else [*row, 9])
    if not padded:
        rows = [rows[0]] * 2 if kind == "text" else rows
        width = max(map(len, rows))
        rows = [row + [9] * (width - len(row)) for row in rows]
    plain = PaddingCollator()([{"input_ids": row, "labels": row} for row in rows])
    plain |= media.columns(generator)
    collate = MRopeCollator(
        lambda _: dict(plain),
        MRopeSpec.from_config(model.config),
        VisionSpec.from_config(model.config),
        audio=tower,
    )
    return plain, collate(None)


class _Media:
    """Tokens of media as they are asked for, and their columns at the end."""

    def __init__(self, config: Any, tower: AudioSpec) -> None:
        self.config, self.tower = config, tower
        self.grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        self.lengths: list[int] = []

    def image(self) -> list[int]:
        self.grids["image"].append([1, 4, 4])
        return [START, *[IMAGE] * 4, END]

    def audio(self, length: int) -> list[int]:
        self.lengths.append(length)
        tokens = int(audio_tokens(self.tower, np.array([length]))[0])
        return [AUDIO_START, *[AUDIO] * tokens, END]

    def video(self, length: int) -> list[int]:
        """Two frames of two tokens, with audio inside."""
        self.grids["video"].append([2, 2, 4])
        _, *audio, _ = self.audio(length)
        return [START, AUDIO_START, *[VIDEO] * 4, *audio, END, END]

    def columns(self, generator: torch.Generator) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        vision = self.config.vision_config
        size = 3 * vision.temporal_patch_size * vision.patch_size**2
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if self.grids[kind]:
                patches = sum(t * h * w for t, h, w in self.grids[kind])
                columns[f"{kind}_grid_thw"] = torch.tensor(self.grids[kind])
                columns[name] = torch.randn(patches, size, generator=generator)
        if self.grids["video"]:
            columns["video_second_per_grid"] = torch.tensor([0.5] * len(self.grids["video"]))
            columns["use_audio_in_video"] = True
        if self.lengths:
            lengths = torch.tensor(self.lengths)
            columns["input_features"] = torch.randn(len(lengths), BINS, MELS, generator=generator)
            columns["feature_attention_mask"] = (torch.arange(MELS) < lengths[:, None]).long()
        return columns


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_results_without_a_sync(
    family: str, attention: str, kind: str, padded: bool
) -> None:
    plain, batch = make_batches(family, kind, padded)
    model = make_model(family, attention)
    own, own_gradients = step(model, plain)
    atol = 1e-6 if attention == "eager" else 0.0
    for prepare in (lambda: None, lambda: attach(model)):
        prepare()
        output, gradients = step(model, batch)
        torch.testing.assert_close(output.logits, own.logits, rtol=0, atol=atol)
        assert gradients.keys() == own_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, own_gradients[name], rtol=0, atol=10 * atol)
    guard = guarded_step(model, batch)
    assert guard.count == 0, guard.report()
    detach(model)
    assert torch.equal(step(model, plain)[0].logits, own.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_without_its_tensors_is_refused(family: str) -> None:
    plain, batch = make_batches(family, "audio", padded=True)
    model = attach(make_model(family))
    with pytest.raises(MRopeError, match="got audio without audio_scatter_index"):
        model(**{name: value for name, value in batch.items() if name != "audio_scatter_index"})
    detach(model)
    attach(model, strict=False)
    assert torch.equal(model(**plain).logits, detach(model)(**plain).logits)


def test_an_older_transformers_reads_no_audio_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrope.towers.audio.installed_transformers", lambda: "5.8.1")
    spec = MRopeSpec.from_config(tiny_thinker(FAMILIES[0]).config, "transformers-5.23")
    with pytest.raises(MRopeError, match=r"transformers 5.8.1 does not read audio tensors"):
        MRopeCollator(None, spec, audio=AudioSpec(n_window=100))


def test_the_syncs_in_the_docs_are_those_counted() -> None:
    from support import thinker_syncs

    written = json.loads(thinker_syncs.FILE.read_text(encoding="utf-8"))
    assert thinker_syncs.count_thinkers() == written["rows"]
