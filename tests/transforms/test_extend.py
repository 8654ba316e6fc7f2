"""`extend` equals `rope_index` on the concatenation, bit for bit, in every family that decodes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeError, SpanMismatchError, rope_index
from mrope.guard import SyncGuard
from mrope.spec.families import ONE_DIMENSIONAL
from mrope.transforms import as_text, extend
from support.batches import ROWS, TEXT_IDS
from support.specs import example_spec
from support.turns import Case, random_case, tokens_of

# GLM-Image draws, and talkers speak: their models number that themselves.
SILENT = ("glm_image", "qwen2_5_omni_talker", "qwen3_omni_moe_talker")
DECODING = [(family, name) for family, name in ROWS if family not in SILENT]
PACKED = [
    (family, name) for family, name in DECODING if example_spec(family, name).family_row.packs
]
# In all 2,000 cases or more.
CASES = -(-2000 // len(DECODING))
IMAGE = {"input_ids": [101, 102, 102, 9], "image_grid_thw": [[1, 2, 4]]}


def prompts_of(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """Return positions and deltas of the prompts, and what the family asks for besides."""
    ids, mask = case.ids_and_mask()
    sizes = case.prompt_sizes()
    positions, deltas = rope_index(case.spec, ids, mask, **sizes)
    asked = case.spec.family_row.counts_images or positions.dtype == np.float32
    return (
        positions,
        deltas,
        {"attention_mask": mask, **({"input_ids": ids, **sizes} if asked else {})},
    )


def assert_equal(actual: Any, expected: Any, number: int) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"case {number}", strict=True)


@pytest.mark.parametrize(("family", "reference"), DECODING)
def test_equal_to_the_concatenation(family: str, reference: str) -> None:
    rng, spec = random.Random(f"{family} {reference}"), example_spec(family, reference)
    for number in range(CASES):
        case = random_case(rng, spec)
        positions, deltas, given = prompts_of(case)
        actual = extend(spec, positions, deltas, case.turns, **given)
        assert_equal(actual, case.expected(), number)


@pytest.mark.parametrize(("family", "reference"), PACKED)
def test_flattened_prompts(family: str, reference: str) -> None:
    rng, spec = random.Random(f"{family} {reference} flat"), example_spec(family, reference)
    for number in range(CASES):
        case = random_case(rng, spec)
        ids, mask = case.ids_and_mask()
        lengths, flat = mask.sum(1).tolist(), ids[mask != 0][None]
        sizes = {name: one for name, one in case.prompt_sizes().items() if "_sample" not in name}
        positions, deltas = rope_index(spec, flat, seq_lengths=[lengths], **sizes)
        own = np.concatenate([np.arange(length) for length in lengths])[None, None]
        given = {"input_ids": flat, **case.prompt_sizes()} if positions.dtype == np.float32 else {}
        for text in (False, True):
            rows = np.concatenate((own.astype(positions.dtype), positions)) if text else positions
            actual, ends = extend(spec, rows, deltas, case.turns, seq_lengths=lengths, **given)
            if text:
                length_D = [
                    n + sum(map(len, map(tokens_of, t)))
                    for n, t in zip(lengths, case.turns, strict=True)
                ]
                assert actual[0, 0].tolist() == [one for n in length_D for one in range(n)]
                actual = actual[1:]
            assert_equal((actual, ends), case.expected(packed=True), number)


@pytest.mark.parametrize(("family", "reference"), DECODING)
def test_tensors_without_a_sync(
    family: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths on a device, and a width: the values are those of the arrays, and none is read."""
    rng, spec = random.Random(f"{family} {reference} tensors"), example_spec(family, reference)
    for number in range(4):
        case = random_case(rng, spec)
        positions, deltas, given = prompts_of(case)
        lengths = np.array([rng.choice([0, 1, 2, 9]) for _ in case.prompts])
        texts: dict[str, Any] = {n: given.get(n) for n in ("attention_mask", "input_ids")}
        expected = extend(spec, positions, deltas, lengths, width=9, **texts)
        on_device: dict[str, Any] = {
            k: None if v is None else torch.from_numpy(v) for k, v in texts.items()
        }
        arguments = [torch.from_numpy(one) for one in (positions, deltas, lengths)]
        with monkeypatch.context() as patch:
            # What is on a CPU here stands for what is on a device: only the host looks into it.
            for module in ("responses", "turns"):
                patch.setattr(f"mrope.transforms.{module}.on_host", lambda *_: False)
            with SyncGuard(mode="error"):
                actual = extend(spec, *arguments, width=9, **on_device)
        assert_equal([one.numpy() for one in actual], expected, number)


def test_tensors_with_images_of_a_tool() -> None:
    spec = example_spec()
    positions, deltas = rope_index(spec, [[7, 8]])
    actual = extend(spec, torch.from_numpy(positions), torch.from_numpy(deltas), [[[5], IMAGE]])
    assert isinstance(actual[0], torch.Tensor)
    expected = rope_index(spec, [[7, 8, 5, 101, 102, 102, 9]], image_grid_thw=[[1, 2, 4]])
    assert_equal([one.numpy() for one in actual], expected, 0)


def test_a_prompt_may_end_with_an_image() -> None:
    for family, clip in (("qwen2_vl", [[3, 2, 4]]), ("isaac", None), ("qwen3_vl", None)):
        spec = example_spec(family)
        token = spec.image_token_id if clip is None else spec.video_token_id
        sizes = {"image_grid_thw": [[1, 2, 4]]} if clip is None else {"video_grid_thw": clip}
        prompt = [[7, *[token] * (2 if clip is None else 6)]]
        positions, deltas = rope_index(spec, prompt, **sizes)
        whole = rope_index(spec, [prompt[0] + [8, 9]], **sizes)
        assert_equal(extend(spec, positions, deltas, [2]), whole, 0)


@pytest.mark.parametrize(("family", "reference"), DECODING)
def test_sampled_placeholders(family: str, reference: str) -> None:
    """Refused by row and place, or numbered as text; the model is given other ids for them."""
    spec = example_spec(family, reference)
    rng = random.Random(f"{family} {reference} sampled")
    ids = np.array([rng.choices(TEXT_IDS, k=4) for _ in range(2)])
    positions, deltas = rope_index(spec, ids)
    given: dict[str, Any] = {"input_ids": ids} if positions.dtype == np.float32 else {}
    tokens = {spec.image_token_id, spec.video_token_id, int(spec.extra.get("audio_token_id", -1))}
    # Where the rule looks for markers, a sampled one begins what is no image.
    by_markers = spec.family_row.custom_index or spec.family_row.frames_as_images
    marked = [spec.vision_start_token_id] if by_markers else []
    for token in tokens - {-1}:
        for sampled in ([5, token, 6], [*(set(marked) - {-1}), token, token]):
            place = next(n for n, one in enumerate(sampled) if one in (token, *marked))
            where = rf"row 1, response token {place + 1}: {sampled[place]}, the \w+ "
            with pytest.raises(MRopeError, match=where):
                extend(spec, positions, deltas, [[3], [[9], sampled]], **given)
            as_words = as_text(spec, np.array(sampled))
            assert not {*tokens, *marked} & set(as_words.tolist())
            assert torch.equal(as_text(spec, torch.tensor(sampled)), torch.from_numpy(as_words))
            both = [[3], [[9], sampled]]
            actual = extend(spec, positions, deltas, both, placeholders="text", **given)
            assert_equal(actual, extend(spec, positions, deltas, [1, 1 + len(sampled)], **given), 0)


def test_tokens_beside_images_stay_text() -> None:
    """A sampled placeholder before a tool's image does not take its grid."""
    spec = example_spec()
    positions, deltas = rope_index(spec, [[7]])
    turns = [[[102, 5], IMAGE]]
    actual = extend(spec, positions, deltas, turns, placeholders="text")
    expected = rope_index(spec, [[7, 6, 5, 101, 102, 102, 9]], image_grid_thw=[[1, 2, 4]])
    assert_equal(actual, expected, 0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"position_ids": np.zeros((4, 1, 2), int)}, r"shape \(3, B, P\) in model layout"),
    "mask": ({"attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \(1, 3\)"),
    "ids": ({"input_ids": [[1]]}, r"input_ids has shape \(1, 1\)"),
    "deltas": ({"rope_deltas": [[0], [0]]}, "but there are 1 prompts"),
    "other deltas": ({"rope_deltas": [[-3]]}, r"row 0: rope_deltas has -3, but by its .* is 0"),
    "lost mask": ({"rope_deltas": [[1]]}, "attention_mask that was lost"),
    "rows": ({"responses": [[1], [2]]}, "2 responses, but position_ids have 1 rows"),
    "width": ({"responses": [3], "width": 2}, "width is 2, but the longest response has 3"),
    "negative": ({"responses": [-1]}, "row 0: a response of -1 tokens"),
    "floats": ({"responses": np.array([1.5])}, "must be integers, not torch.float64"),
    "2-D": ({"responses": [[[[1, 2]]]]}, r"row 0: the tokens of a turn must be 1-D"),
    "option": ({"placeholders": "skip"}, "must be 'refuse' or 'text', not 'skip'"),
    "lengths": ({"seq_lengths": [3]}, "add up to 3, but position_ids have 2"),
    "no grid": (
        {"responses": [[{"input_ids": [101, 102]}]]},
        "image 0: found 1 placeholder token, but has no grid",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    spec = example_spec()
    positions, deltas = rope_index(spec, [[7, 8]])
    changed, words = BAD[name]
    given = {"position_ids": positions, "rope_deltas": deltas, "responses": [1], **changed}
    with pytest.raises(MRopeError, match=words):
        extend(spec, **given)


def test_a_turn_that_does_not_fit_its_grid() -> None:
    spec = example_spec()
    positions, deltas = rope_index(spec, [[7, 8]])
    cut = {"input_ids": [101, 102], "image_grid_thw": [[1, 2, 4]]}
    with pytest.raises(SpanMismatchError, match=r"turns, whose .* row 0, image 0: found 1"):
        extend(spec, positions, deltas, [[[5], cut]])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"second_per_grid_ts": [1.0, 2.0, 0.5]},
            "second_per_grid_ts has 3 values, but the turn has 2 clips",
        ),
        ({"second_per_grid_ts": 1.0}, "second_per_grid_ts has 1 values"),
        ({"use_audio_in_video": [False] * 3}, "use_audio_in_video has 3 values"),
        ({"second_per_grid_ts": np.ones(2, np.float16)}, "second_per_grid_ts is float16"),
        ({"second_per_grid_ts": [[1.0], [1.0, 2.0]]}, "second_per_grid_ts is ragged"),
        ({"video_grid_thw": [[[1, 2, 2]] * 2]}, r"video_grid_thw must have shape \(N, 3\)"),
    ],
)
def test_a_turn_whose_seconds_are_not_one_for_each_clip(
    changed: dict[str, Any], words: str, family: str
) -> None:
    """A turn behind it that has one less made the sum right, and the clips took each other's."""
    spec = example_spec(family)
    if not set(changed) & {"second_per_grid_ts", "video_grid_thw", *spec.family_row.inputs}:
        return
    ids = np.array([[7, 8]] * 2)
    positions, deltas = rope_index(spec, ids)
    clip = [101, 103, 98]
    sizes = {"video_grid_thw": [[1, 2, 2]] * 2, "second_per_grid_ts": [1.0, 2.0]}
    turn = {"input_ids": [*clip, *clip, 9], **sizes}
    one = {"input_ids": [*clip, 9], "video_grid_thw": [[1, 2, 2]], "second_per_grid_ts": []}
    extend(spec, positions, deltas, [[5], [turn]], input_ids=ids)
    short = one | {"video_grid_thw": [[1, 2]], "second_per_grid_ts": [1.0]}
    with pytest.raises(MRopeError, match="video_grid_thw of the turns cannot be concatenated"):
        extend(spec, positions, deltas, [[5], [turn, short]], input_ids=ids)
    with pytest.raises(MRopeError, match=f"row 1: {words}"):
        extend(spec, positions, deltas, [[5], [turn | changed, one]], input_ids=ids)


@pytest.mark.parametrize("family", ["qwen3_omni_moe_thinker", "hunyuan_vl"])
def test_families_that_need_the_prompt(family: str) -> None:
    spec = example_spec(family)
    positions, deltas = rope_index(spec, [[7, 8]])
    tool = {"input_ids": [101, 102, 9], "image_grid_thw": [[1, 2, 2]]}
    with pytest.raises(MRopeError, match="needs the input_ids of the prompts, and the sizes"):
        extend(spec, positions, deltas, [[tool]])
    if family != "hunyuan_vl":
        with pytest.raises(MRopeError, match="its positions may be fractions"):
            extend(spec, positions, deltas, [2])
        sizes: dict[str, Any] = {"image_grid_thw": np.array([[1, 2, 2]] * 2)}
        ids = np.array([[7, 101, 102, 9, 5]] * 2)
        positions, deltas = rope_index(spec, ids, np.ones_like(ids), **sizes)
        with pytest.raises(MRopeError, match="of 2 prompts need images_per_sample"):
            extend(spec, positions, deltas, [[tool], [tool]], input_ids=ids, **sizes)


@pytest.mark.parametrize("reference", ["transformers-4.57", "transformers-5.23"])
def test_tokens_that_are_no_placeholder_of_the_family(reference: str) -> None:
    """A family without videos has -1 for their placeholder: one in a row is text."""
    spec = example_spec("isaac", reference)
    prompt, mask, turn = [0, 7, 8, -1], [0, 1, 1, 1], {"input_ids": [9, -1, 8]}
    positions, deltas = rope_index(spec, [prompt], [mask])
    whole = rope_index(spec, [[*prompt, 9, -1, 8]], [[*mask, 1, 1, 1]])
    given: dict[str, Any] = {"attention_mask": [mask], "input_ids": [prompt]}
    assert_equal(extend(spec, positions, deltas, [[turn]], **given), whole, 0)


def test_families_that_do_not_decode_text() -> None:
    positions = np.zeros((3, 1, 1), np.int64)
    for family in SILENT:
        with pytest.raises(MRopeError, match="numbers what it draws or speaks itself"):
            extend(example_spec(family), positions, [[0]], [1])
    with pytest.raises(MRopeError, match="there is nothing to extend"):
        extend(example_spec(next(iter(ONE_DIMENSIONAL))), positions, [[0]], [1])


def test_lengths_on_a_device_need_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = example_spec()
    positions, deltas = rope_index(spec, [[7, 8]])
    monkeypatch.setattr("mrope.transforms.turns.on_host", lambda *_: False)
    with pytest.raises(MRopeError, match="lengths on a device need width"):
        extend(spec, positions, deltas, torch.tensor([2]))
