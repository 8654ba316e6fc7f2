"""The vision tensors: small arrays by hand, transformers' own functions, and live towers."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mrope import MRopeError
from mrope.spec import references
from mrope.spec.families import FAMILIES
from mrope.spec.spec import example_config
from mrope.towers import VisionSpec, check_release, vision, vision_spec, vision_tensors
from mrope.towers.frame_cache import FRAME_CACHE, FrameCache, clear_cache
from mrope.towers.vision import neighbour_offsets, patch_positions, to_frames

EVERYTHING = VisionSpec(spatial_merge_size=2, window_side=4, table_side=48)
MIXED = [[1, 4, 6], [3, 2, 2], [1, 20, 14], [2, 4, 6], [1, 4, 6]]
TOWER_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    clear_cache()


def compute(spec: VisionSpec, grid_thw: Any) -> dict[str, Any]:
    return dict(vision_tensors(spec, grid_thw))


def equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether both hold the same keys, types, dtypes, shapes and bits."""
    return list(ours) == list(theirs) and all(
        type(value) is type(theirs[key])
        and np.asarray(value).dtype == np.asarray(theirs[key]).dtype
        and np.asarray(value).shape == np.asarray(theirs[key]).shape
        and np.asarray(value).tobytes() == np.asarray(theirs[key]).tobytes()
        for key, value in ours.items()
    )


# Small arrays, written by hand.


@pytest.mark.parametrize(("merge", "side"), [(1, 3), (2, 3), (2, 5)])
def test_neighbours_of_a_patch_lie_around_it(merge: int, side: int) -> None:
    grids = [[1, 2 * merge, 3 * merge], [2, merge, merge]]
    frames = to_frames(grids, merge)
    offsets: Any = neighbour_offsets(frames, merge, side)["neighbour_offsets"]
    positions: Any = patch_positions(frames, merge)["position_ids"]
    places = positions.tolist()
    frame_of = np.arange(3).repeat(frames.patches_F).tolist()
    at = [*zip(frame_of, *zip(*places, strict=True), strict=True)]
    patch_at = {one: patch for patch, one in enumerate(at)}
    reach = range(-(side // 2), side // 2 + 1)
    for patch, (frame, row, column) in enumerate(at):
        around = [(frame, row + down, column + along) for down in reach for along in reach]
        assert offsets[patch].tolist() == [patch_at.get(one, patch) - patch for one in around]
    assert offsets.dtype == np.int32 and len(offsets) == len(places)


def test_every_frame_is_a_segment() -> None:
    tensors = compute(VisionSpec(2), [[1, 2, 4], [3, 2, 2]])
    assert tensors["cu_seqlens"].tolist() == [0, 8, 12, 16, 20]
    assert tensors["cu_seqlens"].dtype == np.int32
    assert tensors["max_seqlen"] == 8
    assert type(tensors["max_seqlen"]) is int
    assert list(tensors) == ["cu_seqlens", "max_seqlen", "position_ids"]


def test_patches_come_in_merge_blocks_and_again_for_each_frame() -> None:
    block = [[0, 0], [0, 1], [1, 0], [1, 1]]
    second = [[0, 2], [0, 3], [1, 2], [1, 3]]
    positions = compute(VisionSpec(2), [[2, 2, 4]])["position_ids"]
    assert positions.tolist() == [*block, *second, *block, *second]
    assert positions.dtype == np.int64
    merge_3 = compute(VisionSpec(3), [[1, 3, 3]])["position_ids"]
    assert merge_3.tolist() == [[y, x] for y in range(3) for x in range(3)]


def test_windows_are_cut_at_the_edges_and_numbered_over_all_grids() -> None:
    # 3 x 3 merged tokens in windows of 2 x 2, then a single token.
    tensors = compute(VisionSpec(2, window_side=2), [[1, 6, 6], [1, 2, 2]])
    assert tensors["window_index"].tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8, 9]
    assert tensors["cu_window_seqlens"].tolist() == [0, 16, 24, 32, 36, 40]
    assert tensors["cu_window_seqlens"].dtype == np.int32
    assert tensors["max_window_seqlen"] == 16
    assert type(tensors["max_window_seqlen"]) is int


def test_each_frame_of_a_clip_has_windows_of_its_own() -> None:
    tensors = compute(VisionSpec(1, window_side=2), [[2, 2, 3]])
    assert tensors["window_index"].tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11]
    assert tensors["cu_window_seqlens"].tolist() == [0, 4, 6, 10, 12]


def test_a_table_of_3_stretched_to_2_and_to_5() -> None:
    tensors = compute(VisionSpec(1, table_side=3), [[1, 2, 5]])
    # Columns lie at 0, 0.5, 1, 1.5, 2 and rows at 0 and 2 of the table, whose row has 3 entries.
    upper = [[0, 1, 3, 4], [0, 1, 3, 4], [1, 2, 4, 5], [1, 2, 4, 5], [2, 2, 5, 5]]
    lower = [[6 + left, 6 + right, 6 + left, 6 + right] for left, right, _, _ in upper]
    assert tensors["interp_indices"].tolist() == upper + lower
    row = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]]
    assert tensors["interp_weights"].tolist() == row + row
    assert tensors["interp_indices"].dtype == np.int64
    assert tensors["interp_weights"].dtype == np.float32


@pytest.mark.parametrize("none", [None, [], np.empty((0, 3), np.int64), torch.empty(0, 3).long()])
def test_without_grids_there_is_nothing_to_attach(none: Any) -> None:
    assert compute(EVERYTHING, none) == {}


def test_lists_arrays_and_tensors_are_the_same_grids() -> None:
    ours = compute(EVERYTHING, MIXED)
    assert tuple(ours) == EVERYTHING.keys
    assert equal(ours, compute(EVERYTHING, np.array(MIXED, np.int32)))
    assert equal(ours, compute(EVERYTHING, torch.tensor(MIXED)))


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[1, 4, 6], [1, 4, 5]], r"grid_thw\[1\] = \[1, 4, 5\].*spatial_merge_size=2"),
        ([[0, 4, 4]], r"grid_thw\[0\] = \[0, 4, 4\]: sizes must be at least 1"),
        ([[1, -2, 4]], "at least 1"),
        ([[4, 6]], r"shape \(N, 3\), not \(1, 2\)"),
        ([1, 4, 6], r"shape \(N, 3\), not \(3,\)"),
        ([[1.0, 4.0, 6.0]], "must hold integers, not float64"),
        ([[1, 4], [1, 4, 6]], "ragged"),
    ],
)
def test_bad_grids_are_refused(grids: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        compute(EVERYTHING, grids)


# The spec.


def test_the_spec_is_read_from_the_model_or_from_its_tower() -> None:
    tower = {
        "model_type": "qwen3_vl_vision",
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "window_size": 112,
    }
    row = FAMILIES["qwen3_vl"].tower
    assert row is not None
    spec = VisionSpec(2, table_side=48, patch_shape=(1536,), tower=row)
    assert VisionSpec.from_config(tower) == spec
    assert VisionSpec.from_config({"model_type": "qwen3_vl", "vision_config": tower}) == spec
    # A table that is not square is used up to the largest square, as the towers do.
    uneven = tower | {"num_position_embeddings": 2400}
    assert VisionSpec.from_config(uneven) == spec


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("qwen2_vl", (3 * 2 * 14 * 14,)),
        ("qwen3_vl", (3 * 2 * 16 * 16,)),
        ("ernie4_5_vl_moe", (3 * 14 * 14,)),
        ("cosmos3_edge", (3 * 16 * 16,)),
        ("paddleocr_vl", (3, 14, 14)),
    ],
)
def test_the_shape_of_a_patch_is_the_tower_s(family: str, shape: tuple[int, ...]) -> None:
    assert VisionSpec.from_config({"model_type": family}).patch_shape == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # A null is no value, and transformers' class does not put its default there either.
        ({"model_type": "qwen2_vl", "spatial_merge_size": None}, "has no spatial_merge_size"),
        ({"model_type": "qwen3_5", "num_position_embeddings": None}, "has no num_position_emb"),
        ({"model_type": "qwen2_5_vl", "window_size": None}, "has no window_size"),
        ({"model_type": "qwen2_5_vl", "patch_size": None}, "has no patch_size"),
        (
            {
                "model_type": "qwen2_5_vl",
                "spatial_merge_size": 2,
                "window_size": 20,
                "patch_size": 14,
            },
            "window_size=20 is smaller than a merged token of 2 x 14 pixels",
        ),
        ({"model_type": "llama"}, "'llama' has no vision tower.*known: qwen2_vl"),
        ({"vision_config": {}}, "None has no vision tower"),
        ({"model_type": "qwen2_vl", "vision_config": 3}, "must be a section, not 3"),
        ({"model_type": "qwen2_vl", "spatial_merge_size": "2"}, "must be an integer"),
    ],
)
def test_a_config_that_lacks_something_is_refused(config: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        VisionSpec.from_config(config)


def test_the_spec_pickles_and_hashes() -> None:
    assert pickle.loads(pickle.dumps(EVERYTHING)) == EVERYTHING
    assert len({EVERYTHING, VisionSpec(2, 4, 48), VisionSpec(2, 4)}) == 2


@pytest.mark.parametrize(
    ("spec", "version", "unread"),
    [
        (VisionSpec(2), "4.57.6", "cu_seqlens, max_seqlen, position_ids; install 5.9"),
        (VisionSpec(2, window_side=4), "5.8.1", "max_window_seqlen; install 5.9"),
    ],
)
def test_a_release_that_does_not_read_them_is_refused(
    spec: VisionSpec, version: str, unread: str
) -> None:
    with pytest.raises(MRopeError, match=f"transformers {version} does not read .* {unread}"):
        check_release(spec, version)


def test_a_release_that_reads_them_passes() -> None:
    for version in ("5.9.0", "5.17.0.dev0", "5.23.0", "6.0"):
        check_release(EVERYTHING, version)
    with pytest.raises(MRopeError, match="cannot read transformers' version 'main'"):
        check_release(EVERYTHING, "main")
    with (
        mock.patch.object(vision_spec, "installed_transformers", return_value="5.8.1"),
        pytest.raises(MRopeError, match=r"5\.8\.1"),
    ):
        check_release(EVERYTHING)
    with mock.patch.object(vision_spec, "installed_transformers", return_value=None):
        check_release(EVERYTHING)


@pytest.mark.parametrize(
    ("release", "corners"), [("5.12.1", 0), ("5.13.0", 1), ("5.22.2", 1), ("5.23.0", 0)]
)
def test_a_table_is_interpolated_as_the_installed_tower_does(release: str, corners: int) -> None:
    """PaddleOCR-VL's, from corner to corner for as long as its tower does."""
    config = example_config("paddleocr_vl")
    with mock.patch.object(references, "installed_transformers", return_value=release):
        spec = VisionSpec.from_config(config)
    grid = [[1, 6, 4]]
    expected = vision.table_taps(
        vision.to_frames(grid, 1), 1, spec.table_side or 0, corners=bool(corners)
    )
    taps = vision_tensors(spec, grid)["interp_weights"]
    np.testing.assert_array_equal(taps, expected["interp_weights"])


# What is remembered.


def test_results_do_not_depend_on_the_cache_and_belong_to_the_caller() -> None:
    cold = compute(EVERYTHING, MIXED)
    kept = {key: np.copy(value) for key, value in cold.items() if isinstance(value, np.ndarray)}
    for array in kept:
        cold[array][...] = 77
    warm = vision_tensors(EVERYTHING, MIXED)
    for key, value in kept.items():
        np.testing.assert_array_equal(warm[key], value, strict=True)
    vision_tensors(VisionSpec(1, 3, 5), [[1, 4, 6], [1, 20, 14]])
    clear_cache()
    assert equal(vision_tensors(EVERYTHING, MIXED), warm)


def test_a_single_grid_is_no_view_of_the_cache() -> None:
    for array in vision_tensors(EVERYTHING, [[1, 4, 4]]).values():
        assert isinstance(array, int) or array.flags.writeable


def test_each_distinct_size_is_computed_once() -> None:
    with mock.patch.object(vision, "_positions", wraps=vision._positions) as build:
        vision_tensors(VisionSpec(2), MIXED)
        assert build.call_count == 3
        vision_tensors(VisionSpec(2), MIXED)
        assert build.call_count == 3


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    memory = FrameCache(limit=20_000)
    for width in range(2, 60, 2):
        memory.recall(vision._positions, 2, width, 2)
        held = sum(1024 + array.nbytes for piece in memory._pieces.values() for array in piece)
        assert memory.used == held <= memory.limit
    assert 0 < len(memory._pieces) < 29
    assert (vision._positions, 2, 58, 2) in memory._pieces
    assert (vision._positions, 2, 2, 2) not in memory._pieces


def test_what_was_used_last_is_kept() -> None:
    memory = FrameCache(limit=3 * (1024 + 64))
    builds: list[int] = []

    def build(number: int) -> tuple[Any, ...]:
        builds.append(number)
        return (np.zeros(8),)

    for number in (1, 2, 3, 1, 4, 1, 2):
        memory.recall(build, number)
    assert builds == [1, 2, 3, 4, 2]


def test_a_frame_larger_than_the_cache_is_computed_and_not_kept() -> None:
    memory = FrameCache(limit=2000)
    memory.recall(vision._positions, 2, 2, 2)
    (positions,) = memory.recall(vision._positions, 20, 20, 2)
    assert positions.shape == (400, 2)
    assert list(memory._pieces) == [(vision._positions, 2, 2, 2)]
    with mock.patch.object(vision, "FRAME_CACHE", memory):
        ours = vision_tensors(EVERYTHING, MIXED)
    assert equal(ours, vision_tensors(EVERYTHING, MIXED))


def test_remembered_arrays_cannot_be_written() -> None:
    (positions,) = FRAME_CACHE.recall(vision._positions, 4, 4, 2)
    with pytest.raises(ValueError, match="read-only"):
        positions[0] = 1


def test_threads_may_share_the_cache() -> None:
    expected = vision_tensors(EVERYTHING, MIXED)
    memory = FrameCache(limit=60_000)  # too small for all: threads evict each other's frames
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        for _ in range(40):
            vision_tensors(EVERYTHING, 2 * order.integers(1, 12, (5, 3)))
            if not equal(vision_tensors(EVERYTHING, MIXED), expected):
                wrong.append(seed)

    with mock.patch.object(vision, "FRAME_CACHE", memory):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert memory.used == sum(map(memory._size, memory._pieces.values())) <= memory.limit


def test_two_threads_that_miss_the_same_frame_keep_one() -> None:
    memory, both = FrameCache(limit=10_000), threading.Barrier(2)

    def build(number: int) -> tuple[Any, ...]:
        both.wait(10)
        return (np.zeros(number),)

    threads = [threading.Thread(target=memory.recall, args=(build, 8)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.used == 1024 + 64


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_a_thread_that_uses_the_cache() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with FRAME_CACHE.lock:
            held.set()
            release.wait(1)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=vision_tensors, args=(EVERYTHING, MIXED))
    process.start()
    process.join(20)
    release.set()
    thread.join()
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0


def _lines_run(spec: VisionSpec, grids: list[list[int]]) -> int:
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line" and frame.f_code.co_filename == vision.__file__
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        vision_tensors(spec, grids)
    finally:
        sys.settrace(before)
    return count


def test_python_does_not_loop_over_patches_frames_or_repeated_images() -> None:
    few = _lines_run(EVERYTHING, [[1, 4, 4]])
    clear_cache()
    many = _lines_run(EVERYTHING, [[500, 64, 64]])
    assert 0 < many == few
    clear_cache()
    assert _lines_run(EVERYTHING, [[1, 4, 4]] * 50) == few


# The functions of transformers.


def _theirs(spec: VisionSpec, grids: Any) -> dict[str, Any]:
    """What `transformers.vision_utils` computes for the same tower, under flash attention."""
    utils = pytest.importorskip("transformers.vision_utils")
    from types import SimpleNamespace

    from transformers.utils.generic import get_max_seqlen

    flash: Any = SimpleNamespace(_attn_implementation="flash_attention_2")
    grid, merge = torch.as_tensor(np.asarray(grids)), spec.spatial_merge_size
    cu_seqlens, max_seqlen = utils.get_vision_attention_seqlens(grid, flash)
    tensors: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "position_ids": utils.get_vision_position_ids(grid, merge),
    }
    if spec.window_side is not None:
        patch = 14
        order, borders = utils.get_vision_window_index(
            grid, merge, spec.window_side * merge * patch, patch
        )
        tensors["window_index"], tensors["cu_window_seqlens"] = order, borders
        tensors["max_window_seqlen"] = get_max_seqlen(borders, flash)
    if spec.table_side is not None:
        tensors["interp_indices"], tensors["interp_weights"] = (
            utils.get_vision_interpolation_indices_and_weights(
                grid, spec.table_side, "bilinear", align_corners=True, spatial_merge_size=merge
            )
        )
    return {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in tensors.items()
    }


@pytest.mark.parametrize("seed", range(40))
def test_random_grids_equal_transformers_bit_for_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        merge = int(rng.integers(1, 5))
        spec = VisionSpec(merge, int(rng.integers(1, 9)), int(rng.integers(1, 65)))
        count = int(rng.integers(1, 9))
        grids = np.column_stack(
            (rng.integers(1, 5, count), merge * rng.integers(1, 14, (count, 2)))
        )
        assert equal(vision_tensors(spec, grids), _theirs(spec, grids)), (spec, grids.tolist())


@pytest.mark.parametrize("side", [1, 2, 3, 16, 27, 32, 48, 64])
def test_weights_of_every_length_to_200_equal_transformers_bit_for_bit(side: int) -> None:
    spec = VisionSpec(1, table_side=side)
    # Every length as a height and as a width, beside one that shares no factor with most of them.
    grids = [[1, length, 7] for length in range(1, 201)] + [
        [1, 11, length] for length in range(1, 201)
    ]
    assert equal(vision_tensors(spec, grids), _theirs(spec, grids))


def test_a_long_clip_equals_transformers() -> None:
    spec = VisionSpec(2, window_side=4, table_side=48)
    grids = [[64, 26, 34], [1, 2, 2]]
    assert equal(vision_tensors(spec, grids), _theirs(spec, grids))


# Unmodified towers.


def _prefixed(name: str, spec: VisionSpec, grid_thw: Any) -> dict[str, Any]:
    return {
        f"{name}_{key}": torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in vision_tensors(spec, grid_thw).items()
    }


def _tiny(family: str) -> tuple[Any, VisionSpec, dict[str, Any], dict[str, Any]]:
    """Return a tiny model, its tower's spec, a batch, and the batch's vision tensors."""
    pytest.importorskip("transformers.vision_utils")
    from mrope import MRopeCollator
    from support.models import tiny_examples, tiny_model, tiny_spec

    model = tiny_model(family)
    spec = VisionSpec.from_config(model.config)
    if spec.window_side is not None:
        # Frames of the tiny examples have sides of 1 to 3 merged tokens: windows must be smaller.
        model.model.visual.window_size = 56
        spec = VisionSpec(spec.spatial_merge_size, window_side=2)
    batch = MRopeCollator(None, tiny_spec(family))(tiny_examples(family))
    tensors = _prefixed("image", spec, batch["image_grid_thw"])
    tensors |= _prefixed("video", spec, batch["video_grid_thw"])
    return model, spec, batch, tensors


@pytest.mark.parametrize("family", TOWER_FAMILIES)
def test_the_tower_reads_them_and_gives_the_same_logits(family: str) -> None:
    model, spec, batch, tensors = _tiny(family)
    seen: list[int | None] = []
    for block in model.model.visual.blocks:
        block.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["max_seqlen"]), with_kwargs=True
        )
    with torch.no_grad():
        own = model(**batch).logits
        assert set(seen) == {None}
        seen.clear()
        # What the helpers need when they are not given their tensors.
        utils = sys.modules["transformers.vision_utils"]
        refuse: Any = {"side_effect": AssertionError("the tower computed from its grids")}
        with (
            mock.patch.object(torch, "repeat_interleave", **refuse),
            mock.patch.object(torch, "meshgrid", **refuse),
            mock.patch.object(torch, "unique_consecutive", **refuse),
            mock.patch.object(utils, "_interpolation_axis_taps_weights", **refuse),
        ):
            ours = model(**batch, **tensors).logits
            with pytest.raises(AssertionError, match="the tower computed"):
                model(**batch)
    assert torch.equal(ours, own)
    longest = {key: value for key, value in tensors.items() if isinstance(value, int)}
    assert set(seen) == set(longest.values())
    assert {key.split("_", 1)[1] for key in tensors} == set(spec.keys)


_POISON: dict[str, Callable[[Any], Any]] = {
    "cu_seqlens": lambda borders: borders[[0, -1]],
    "position_ids": lambda positions: positions.flip(1) * 3,
    "window_index": lambda order: order.roll(1),
    "cu_window_seqlens": lambda borders: borders[[0, -1]],
    "interp_indices": lambda indices: indices.roll(1, 0),
    "interp_weights": lambda weights: weights * 2,
}


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("family", TOWER_FAMILIES)
def test_a_wrong_tensor_would_be_seen(family: str, modality: str) -> None:
    model, spec, batch, tensors = _tiny(family)
    with torch.no_grad():
        right = model(**batch, **tensors).logits
        for key in spec.keys:
            if key in _POISON:
                name = f"{modality}_{key}"
                wrong = tensors | {name: _POISON[key](tensors[name])}
                assert not torch.equal(model(**batch, **wrong).logits, right), name


@pytest.mark.parametrize("family", TOWER_FAMILIES)
def test_gradients_are_the_same(family: str) -> None:
    model, _, batch, tensors = _tiny(family)
    gradients = []
    for given in ({}, tensors):
        model.zero_grad()
        model(**batch, **given).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(map(torch.equal, *gradients))
