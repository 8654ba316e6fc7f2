"""`Precheck`: it refuses what the collator refuses, and adds lengths and patches; in maps too."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeCollator, MRopeError, MRopeSpec, SpanMismatchError, TokenBudgetSampler
from mrope.positions.rope_index import rope_index
from mrope.prepare import Precheck, examples_of
from mrope.prepare.precheck import LENGTH, PATCH_PAIRS, PATCHES, SEGMENTS
from mrope.spec.spec import example_config
from mrope.towers import VisionSpec
from support.batches import ROWS, SPAN_ROWS, random_batch
from support.malformed import MALFORMED, Malformed
from support.samples import (
    IMAGE,
    START,
    VIDEO,
    columns_of_samples,
    plain_samples,
    random_samples,
)

datasets = pytest.importorskip("datasets")

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
OWN_ROWS = [row for row in ROWS if row not in SPAN_ROWS]
TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
SIZES = ("image_grid_thw", "video_grid_thw", "target_sizes", "target_sizes_videos")
SAMPLE: dict[str, Any] = {
    "input_ids": [7, START, *[IMAGE] * 4, 8, 9],
    "image_grid_thw": [[1, 4, 4]],
}


def spec_of(row: tuple[str, str]) -> MRopeSpec:
    return MRopeSpec.from_config(example_config(row[0]), row[1])


def patches_of(sample: dict[str, Any]) -> int:
    sizes = [np.asarray(sample[name]).tolist() for name in SIZES if sample.get(name) is not None]
    return sum(math.prod(size) for of in sizes for size in of)


def single_rows(rng: random.Random, spec: MRopeSpec, count: int) -> list[dict[str, Any]]:
    """Return samples of a family with a rule of its own: random batches that have one row."""
    samples: list[dict[str, Any]] = []
    while len(samples) < count:
        batch = random_batch(rng, spec)
        if len(batch["input_ids"]) == 1:
            names = [name for name in batch if not name.endswith("_per_sample")]
            samples.append(
                {
                    name: batch[name][0]
                    if name in TOKENS and batch[name] is not None
                    else batch[name]
                    for name in names
                }
            )
    return samples


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str | None:
    try:
        function(*arguments, **keywords)
    except MRopeError as error:
        return str(error)
    return None


class TestWhatIsAdded:
    @given(row=st.sampled_from(SPAN_ROWS), seed=st.integers(0, 2**32))
    @settings(max_examples=200, deadline=None)
    def test_lengths_and_patches(self, row: tuple[str, str], seed: int) -> None:
        spec = spec_of(row)
        samples = random_samples(random.Random(seed), spec)
        columns = Precheck(spec)(columns_of_samples(samples))
        assert columns[LENGTH].tolist() == [len(one["input_ids"]) for one in samples]
        assert columns[PATCHES].tolist() == [patches_of(one) for one in samples]
        assert columns[LENGTH].dtype == columns[PATCHES].dtype == np.int64

    @pytest.mark.parametrize("row", OWN_ROWS, ids="-".join)
    def test_families_with_a_rule_of_their_own(self, row: tuple[str, str]) -> None:
        spec = spec_of(row)
        samples = single_rows(random.Random("-".join(row)), spec, 30)
        columns = Precheck(spec)(columns_of_samples(samples))
        masks = [one["attention_mask"] for one in samples]
        assert columns[LENGTH].tolist() == [
            len(one["input_ids"]) if mask is None else int(mask.sum())
            for one, mask in zip(samples, masks, strict=True)
        ]
        assert columns[PATCHES].tolist() == [patches_of(one) for one in samples]
        assert columns[PATCHES].any()

    def test_a_small_batch_in_full(self) -> None:
        clip = {
            "input_ids": [START, *[VIDEO] * 2, 9, START, *[VIDEO] * 2],
            "video_grid_thw": [[2, 2, 4]],
        }
        padded = {"input_ids": [0, 0, 7], "attention_mask": [0, 0, 1]}
        given = columns_of_samples([SAMPLE, clip, padded | {"attention_mask": None}])
        columns = Precheck(SPEC)(given)
        assert columns[LENGTH].tolist() == [8, 7, 3]
        assert columns[PATCHES].tolist() == [16, 16, 0]
        assert columns[SEGMENTS].tolist() == [1, 2, 0]
        assert columns[PATCH_PAIRS].tolist() == [16**2, 2 * 8**2, 0]
        assert {name: columns[name] for name in given} == given
        assert Precheck(SPEC)(columns_of_samples([padded]))[LENGTH].tolist() == [1]

    def test_crops_of_minicpm(self) -> None:
        spec = spec_of(("minicpmv4_7", "transformers-5.23"))
        side = spec.spatial_merge_size
        ids = [7, spec.vision_start_token_id, *[spec.image_token_id] * 2, 9]
        columns: dict[str, Any] = {
            "input_ids": [ids, [7]],
            "target_sizes": [[[side, 2 * side]], None],
        }
        assert Precheck(spec)(columns)[PATCHES].tolist() == [2 * side**2, 0]
        assert Precheck(spec)(columns)[SEGMENTS].tolist() == [1, 0]
        assert Precheck(spec)(columns)[PATCH_PAIRS].tolist() == [4 * side**4, 0]
        columns["target_sizes"][0] = [side, 2 * side]
        assert Precheck(spec)(columns)[PATCHES].tolist() == [2 * side**2, 0]

    def test_audio_lengths_from_the_mask_of_features(self) -> None:
        """As in the collator, the mask decides and not `audio_seqlens`."""
        spec = spec_of(("qwen2_5_omni_thinker", "transformers-5.23"))
        start, audio = spec.extra["audio_start_token_id"], spec.extra["audio_token_id"]
        ids = [7, start, *[audio] * 10, 97, 9]
        mask = np.arange(60) < 40
        sample = {"input_ids": ids, "feature_attention_mask": mask[None], "audio_seqlens": [4]}
        columns = Precheck(spec)(columns_of_samples([sample, {"input_ids": [7]}]))
        assert columns[LENGTH].tolist() == [14, 1] and not columns[PATCHES].any()
        del sample["feature_attention_mask"]
        with pytest.raises(SpanMismatchError, match="audio 0: found 10 placeholder tokens"):
            Precheck(spec)(columns_of_samples([sample]))
        sample["audio_seqlens"] = 40
        assert Precheck(spec)(columns_of_samples([sample]))[LENGTH].tolist() == [14]

    def test_rows_that_hold_several_examples(self) -> None:
        """An image touches the next example's image: the border is known by the lengths alone."""
        packed = {
            "input_ids": [7, *[IMAGE] * 4, *[IMAGE] * 4, 8],
            "image_grid_thw": [[1, 4, 4]] * 2,
            "seq_lengths": [5, 5],
        }
        columns = Precheck(SPEC)(columns_of_samples([packed]))
        assert (columns[LENGTH].tolist(), columns[PATCHES].tolist()) == ([10], [32])

    def test_numpy_columns_as_ray_has_them(self) -> None:
        """Object arrays of arrays, one inside the other, read-only, NaN for a null."""
        grids = np.empty(1, np.object_)
        grids[0] = np.array([1, 4, 4])
        ids, images = np.empty(2, np.object_), np.empty(2, np.object_)
        ids[:] = [np.array(SAMPLE["input_ids"]), np.array([7, 8])]
        ids[0].flags.writeable = False
        images[:] = [grids, np.float32(np.nan)]
        columns = Precheck(SPEC)({"input_ids": ids, "image_grid_thw": images})
        assert columns[PATCHES].tolist() == [16, 0]
        examples = examples_of(columns)
        assert list(examples[1]) == ["input_ids", LENGTH, PATCHES, SEGMENTS, PATCH_PAIRS]
        batch = MRopeCollator(None, SPEC)(examples)
        assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]

    def test_a_column_of_nulls_alone_is_not_made_one_of_numbers(self) -> None:
        nulls = np.full(2, np.nan, np.float32)
        columns = {"input_ids": np.array([[7], [8]]), "image_grid_thw": nulls, "score": nulls}
        result = Precheck(SPEC)(columns)
        assert result["image_grid_thw"] == [None, None] and result["score"] is nulls

    def test_a_column_of_numbers_is_not_made_one_of_nulls(self) -> None:
        columns = {"input_ids": [[7], [8]], "use_audio_in_video": np.array([np.nan, 1.0])}
        result = Precheck(SPEC)(columns)
        np.testing.assert_array_equal(result["use_audio_in_video"], [np.nan, 1.0])

    def test_arrow_tables_keep_their_columns_and_types(self) -> None:
        ids = pa.array([[7, 8], SAMPLE["input_ids"]], pa.list_(pa.int32()))
        grids = pa.array([None, [[1, 4, 4]]])
        table = pa.table({"input_ids": ids, "image_grid_thw": grids, "x": ["a", "b"]})
        result = Precheck(SPEC)(table)
        assert result.select(table.column_names).equals(table)
        assert result[LENGTH].to_pylist() == [2, 8] and result[PATCHES].to_pylist() == [0, 16]
        assert result[LENGTH].type == result[PATCHES].type == pa.int64()
        assert Precheck(SPEC)(result).equals(result)
        assert Precheck(SPEC)(table.slice(0, 0)).schema.equals(result.schema)

    def test_precheck_is_plain_data(self) -> None:
        precheck = pickle.loads(pickle.dumps(Precheck(SPEC, VisionSpec(2))))
        assert precheck.spec == SPEC and precheck.vision == VisionSpec(2)
        columns = columns_of_samples([SAMPLE])
        assert precheck(columns)[LENGTH].tolist() == [8]
        assert list(columns) == list(SAMPLE)  # not written to


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "case",
        [one for one in MALFORMED if len(one.arguments["input_ids"]) == 1],
        ids=lambda x: x.name,
    )
    def test_malformed_rows_have_the_error_of_rope_index(self, case: Malformed) -> None:
        spec = spec_of((case.family, case.reference))
        arguments = case.arguments | ({"mm_token_type_ids": case.types} if case.types else {})
        with pytest.raises(MRopeError) as expected:
            rope_index(spec, **arguments)
        sample = {k: v[0] if k in TOKENS else v for k, v in arguments.items()}
        with pytest.raises(type(expected.value)) as caught:
            Precheck(spec)(columns_of_samples([sample]), [0])
        text = str(expected.value).removeprefix("row 0, ").removeprefix("row 0: ")
        assert str(caught.value) == f"row 0 of the dataset: {text}"

    @pytest.mark.parametrize("row", OWN_ROWS, ids="-".join)
    def test_cut_rows_of_families_with_a_rule_of_their_own(self, row: tuple[str, str]) -> None:
        """What `rope_index` refuses is refused, in words that name the span and not a batch."""
        spec = spec_of(row)
        outcomes = []
        for sample in single_rows(random.Random("-".join(row)), spec, 30):
            cut = {
                name: value[: len(value) // 2] if name in TOKENS and value is not None else value
                for name, value in sample.items()
            }
            batch = {
                name: value[None] if name in TOKENS and value is not None else value
                for name, value in cut.items()
            }
            expected = error_of(rope_index, spec, **batch)
            found = error_of(Precheck(spec), columns_of_samples([cut]), [3])
            assert (found is None) == (expected is None)
            outcomes.append(found)
        refused = [text for text in outcomes if text is not None]
        assert len(refused) > 5
        assert all(text.startswith("row 3 of the dataset: ") for text in refused)
        assert not any("row unknown" in text for text in refused)

    def test_rows_of_several_examples_in_families_that_do_not_keep_them_apart(self) -> None:
        packed = {"input_ids": [7, 8], "seq_lengths": [1, 1]}
        alone = spec_of(("hunyuan_vl", "transformers-5.23"))
        with pytest.raises(MRopeError, match=r"row 0 .*: holds 2 examples .seq_lengths., which"):
            Precheck(alone)(columns_of_samples([packed]))
        Precheck(alone)(columns_of_samples([packed | {"seq_lengths": [2]}]))
        # The collator keeps them apart with packing="flatten".
        Precheck(spec_of(("qwen2_5_omni_thinker", "transformers-5.23")))(
            columns_of_samples([packed])
        )

    def test_towers_of_other_models_and_other_arguments(self) -> None:
        with pytest.raises(MRopeError, match="merges 4 patches along each side, but the spec 2"):
            Precheck(SPEC, VisionSpec(4))
        with pytest.raises(TypeError, match="must be an MRopeSpec, not dict"):
            Precheck(example_config("qwen3_vl"))  # type: ignore[arg-type]

    def test_a_start_marker_that_was_lost(self) -> None:
        """Only 4.57 finds spans by it."""
        spec = spec_of(("qwen2_vl", "transformers-4.57"))
        lost = SAMPLE | {"input_ids": [7, 7, *SAMPLE["input_ids"][2:]]}
        with pytest.raises(SpanMismatchError, match="no vision start token"):
            Precheck(spec)(columns_of_samples([lost]))


class TestBadRows:
    def columns(self) -> dict[str, list[Any]]:
        cut = {**SAMPLE, "input_ids": SAMPLE["input_ids"][:4]}
        return columns_of_samples([SAMPLE, SAMPLE, cut])

    def test_with_indices(self) -> None:
        with pytest.raises(SpanMismatchError) as caught:
            Precheck(SPEC)(self.columns(), [40, 41, 42])
        assert str(caught.value).startswith(
            "row 42 of the dataset: image 0: found 2 placeholder tokens, but its grid"
        )
        assert (caught.value.row, caught.value.span, caught.value.needed) == (42, 0, 4)

    @pytest.mark.parametrize("name", ["mrope_index", "index", "id"])
    def test_with_a_column_that_names_rows(self, name: str) -> None:
        columns = self.columns() | {name: np.array([5, 6, 7])}
        with pytest.raises(SpanMismatchError, match=f"^the row with {name} 7: image 0: found 2"):
            Precheck(SPEC)(columns)

    def test_without_either(self) -> None:
        with pytest.raises(
            SpanMismatchError, match=r"^row 2 of a batch at an unknown place .*with_indices=True"
        ):
            Precheck(SPEC)(self.columns())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input_ids": None}, "no input_ids: the column is missing or null"),
            ({"input_ids": [[1, 2], [3]]}, "input_ids is ragged"),
            (
                {"input_ids": [[1, 2], [3, 4]]},
                r"input_ids must be \(n,\) or \(1, n\), not \(2, 2\)",
            ),
            ({"input_ids": [0.5]}, "input_ids must hold integers, not float64"),
            ({"input_ids": ["a"]}, "input_ids must hold integers"),
            ({"attention_mask": [1]}, r"attention_mask has shape \(1, 1\), but input_ids \(1, 8\)"),
            ({"mm_token_type_ids": [0] * 8}, "mm_token_type_ids says 0"),
            ({"image_grid_thw": [[1, 4], [4]]}, "image_grid_thw is ragged"),
            ({"image_grid_thw": [[1, 3, 4]]}, "multiples of spatial_merge_size=2"),
            ({"image_grid_thw": None}, "found 4 placeholder tokens, but has no grid"),
            ({"seq_lengths": [3, 4]}, r"seq_lengths \[.* add up to 7 tokens, but the row has 8"),
        ],
    )
    def test_what_is_wrong_with_a_row(self, change: dict[str, Any], message: str) -> None:
        columns = columns_of_samples([SAMPLE | change])
        with pytest.raises(MRopeError, match=f"row 3 of the dataset: .*{message}"):
            Precheck(SPEC)(columns, [3])

    @pytest.mark.parametrize(
        ("seconds", "message"),
        [
            ({"second_per_grid_ts": [float("nan")]}, "must be finite"),
            ({"second_per_grid_ts": [1.0, 1.0]}, "but the batch has 1 video"),
            (
                {"second_per_grid_ts": [1.0], "video_second_per_grid": [2.0]},
                "both present and differ",
            ),
        ],
    )
    def test_seconds(self, seconds: dict[str, Any], message: str) -> None:
        spec = spec_of(("qwen2_5_vl", "transformers-5.23"))
        clip = {"input_ids": [START, VIDEO, VIDEO], "video_grid_thw": [[1, 2, 4]]}
        with pytest.raises(MRopeError, match=message):
            Precheck(spec)(columns_of_samples([clip | seconds]))

    def test_columns_without_tokens(self) -> None:
        with pytest.raises(MRopeError, match="no input_ids among the columns text, labels"):
            Precheck(SPEC)({"text": ["a"], "labels": [[1]]})


class TestDatasets:
    """`datasets.Dataset.map` and `IterableDataset.map`; the first batches hold text only."""

    table = datasets.Dataset.from_list(plain_samples(40)).with_format(None)
    lengths = tuple(len(one["input_ids"]) for one in plain_samples(40))
    patches = tuple(patches_of(one) for one in plain_samples(40))

    @pytest.mark.parametrize("processes", [None, 2])
    @pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow"])
    def test_map(self, form: str | None, processes: int | None) -> None:
        mapped = self.table.with_format(form).map(
            Precheck(SPEC), batched=True, batch_size=4, num_proc=processes
        )
        result = mapped.with_format(None)
        assert result[LENGTH][:] == list(self.lengths)
        assert result[PATCHES][:] == list(self.patches)
        assert [result.features[name].dtype for name in (LENGTH, PATCHES)] == ["int64"] * 2
        assert result.select_columns(self.table.column_names)[:] == self.table[:]

    @pytest.mark.parametrize("form", [None, "arrow"])
    def test_other_columns_stay_as_they_are(self, form: str | None) -> None:
        """A feature that knows how to decode itself is not decoded, nor are integers widened."""
        features = datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                "image": datasets.Image(),
            }
        )
        rows = {"input_ids": [[7], [8, 9]], "image": [{"bytes": b"no picture", "path": None}] * 2}
        table = datasets.Dataset.from_dict(rows, features=features)
        mapped = table.with_format(form).map(Precheck(SPEC), batched=True)
        assert {name: mapped.features[name] for name in features} == dict(features)
        assert mapped.with_format(None)[LENGTH][:] == [1, 2]

    # Its own call, as it formats what the stage is given.
    @pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
    @pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow"])
    def test_iterable(self, form: str | None) -> None:
        stream = self.table.to_iterable_dataset(num_shards=3).with_format(form)
        mapped = stream.map(Precheck(SPEC), batched=True, batch_size=4)
        found = [(row[LENGTH], row[PATCHES]) for row in mapped.with_format(None)]
        assert found == list(zip(self.lengths, self.patches, strict=True))

    def test_through_parquet_to_batches_of_a_budget(self, tmp_path: Path) -> None:
        mapped = self.table.map(Precheck(SPEC), batched=True)
        mapped.to_parquet(tmp_path / "rows.parquet")
        again = datasets.Dataset.from_parquet(
            str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path)
        )
        batches = list(TokenBudgetSampler(again[LENGTH], 64, seed=1))
        assert sorted(place for batch in batches for place in batch) == list(range(40))
        assert max(sum(self.lengths[place] for place in batch) for batch in batches) <= 64

    @pytest.mark.parametrize("processes", [None, 2])
    def test_a_bad_row_is_named_by_its_place(self, processes: int | None) -> None:
        samples = plain_samples(40)
        samples[37]["input_ids"] = samples[37]["input_ids"][:-4]
        table = datasets.Dataset.from_list(samples)
        with pytest.raises(MRopeError, match="row 37 of the dataset"):
            table.map(Precheck(SPEC), batched=True, with_indices=True, num_proc=processes)

    def test_the_result_is_cached(self) -> None:
        """`datasets` keeps what a function made by its hash; the same stage must have the same."""
        hashed: Callable[[Any], str] = datasets.fingerprint.Hasher.hash
        assert hashed(Precheck(SPEC)) == hashed(pickle.loads(pickle.dumps(Precheck(SPEC))))
        other = spec_of(("qwen3_vl", "transformers-5.17"))
        assert hashed(Precheck(SPEC)) != hashed(Precheck(other))


def test_the_wing_imports_neither_ray_nor_arrow_nor_transformers() -> None:
    heavy = {"ray", "pyarrow", "datasets", "transformers"}
    code = f"import sys, mrope.prepare; assert not {heavy!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_map_over_single_rows_is_named(form: str | None) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[7, 8], [9, 10]]}).with_format(form)
    check = Precheck(SPEC)
    with pytest.raises(MRopeError, match="call map with batched=True"):
        rows.map(check)
    assert rows.map(check, batched=True).with_format(None)["mrope_length"][:] == [2, 2]


def test_lists_of_the_user_pass_through_numpys_format() -> None:
    """An empty list is an array of floats then, which `datasets` does not write beside texts."""
    rows = {"input_ids": [[7, 8], [9]], "tags": [["a", "b"], []], "weights": [[[1.0]], []]}
    data = datasets.Dataset.from_dict(rows).with_format("numpy")
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    checked = data.map(Precheck(spec), batched=True).with_format(None)
    assert checked["tags"][:] == rows["tags"] and checked["weights"][:] == rows["weights"]
