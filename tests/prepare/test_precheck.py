"""`Precheck`: what is stored gives the batch that is made without it, or an error; in maps too."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeCollator, MRopeError, MRopeSpec, SpanMismatchError, TokenBudgetSampler
from mrope.collate.padding import PaddingCollator
from mrope.collate.skip_bad import RejectWarning
from mrope.positions.stored import COLUMNS, FIELDS, LENGTH, SPANS, STAMP, stamp_of
from mrope.prepare.precheck import Precheck, examples_of
from mrope.spec.families import FAMILIES
from mrope.spec.spec import example_config
from mrope.towers.vision import VisionSpec
from support.batches import SPAN_ROWS
from support.stored import IMAGE, START, VIDEO, columns_of_samples, plain_samples, random_samples

datasets = pytest.importorskip("datasets")

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
PACKED = tuple(row for row in SPAN_ROWS if FAMILIES[row[0]].packs)
SAMPLE: dict[str, Any] = {
    "input_ids": [7, START, *[IMAGE] * 4, 8, 9],
    "image_grid_thw": [[1, 4, 4]],
}


def spec_of(row: tuple[str, str]) -> MRopeSpec:
    return MRopeSpec.from_config(example_config(row[0]), row[1])


def stored(samples: list[dict[str, Any]], spec: MRopeSpec = SPEC) -> list[dict[str, Any]]:
    """Return samples with what the stage stores, and nothing else changed."""
    columns = Precheck(spec)(columns_of_samples(samples))
    added = [{name: columns[name][row] for name in COLUMNS} for row in range(len(samples))]
    return [{**sample, **new} for sample, new in zip(samples, added, strict=True)]


def require_equal(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), name
        else:
            assert type(ours[name]) is type(value) and ours[name] == value, name


class TestStoredAndExpandedEqualsDirect:
    @pytest.mark.parametrize("side", ["left", "right"])
    @given(row=st.sampled_from(SPAN_ROWS), seed=st.integers(0, 2**32))
    @settings(max_examples=150, deadline=None)
    def test_padded(self, side: Any, row: tuple[str, str], seed: int) -> None:
        spec = spec_of(row)
        samples = random_samples(random.Random(seed), spec)
        tower = VisionSpec(spec.spatial_merge_size, table_side=16)
        collate = MRopeCollator(PaddingCollator(padding_side=side), spec, tower)
        require_equal(collate(stored(samples, spec)), collate(samples))

    @given(
        row=st.sampled_from(PACKED), seed=st.integers(0, 2**32), multiple=st.sampled_from([1, 8])
    )
    @settings(max_examples=100, deadline=None)
    def test_flattened(self, row: tuple[str, str], seed: int, multiple: int) -> None:
        spec = spec_of(row)
        samples = [*random_samples(random.Random(seed), spec), {"input_ids": [7]}]
        samples = [
            {name: value for name, value in one.items() if name != "mm_token_type_ids"}
            for one in samples
        ]
        collate = MRopeCollator(None, spec, packing="flatten", pad_to_multiple_of=multiple)
        require_equal(collate(stored(samples, spec)), collate(samples))

    @pytest.mark.parametrize("row", SPAN_ROWS, ids="-".join)
    def test_every_family_and_reference(self, row: tuple[str, str]) -> None:
        spec = spec_of(row)
        rng = random.Random("-".join(row))
        collate = MRopeCollator(None, spec)
        for _ in range(10):
            samples = random_samples(rng, spec)
            require_equal(collate(stored(samples, spec)), collate(samples))

    def test_rows_that_hold_several_examples(self) -> None:
        """An image touches the next example's image: the border is known by the lengths alone."""
        packed = {
            "input_ids": [7, *[IMAGE] * 4, *[IMAGE] * 4, 8],
            "image_grid_thw": [[1, 4, 4]] * 2,
            "seq_lengths": [5, 5],
        }
        collate = MRopeCollator(None, SPEC, packing="flatten")
        samples = [packed, SAMPLE | {"seq_lengths": [8]}]
        batch = collate(stored(samples))
        require_equal(batch, collate(samples))
        assert batch["cu_seq_lens_q"].tolist() == [0, 5, 10, 18]

    def test_padding_of_the_dataset_is_not_counted(self) -> None:
        padded = {
            "input_ids": [0, 0, *SAMPLE["input_ids"]],
            "attention_mask": [0, 0, *[1] * 8],
            "image_grid_thw": [[1, 4, 4]],
        }
        (with_spans,) = stored([padded])
        assert with_spans[SPANS].tolist() == [1, 2, 1, 2, 2] and with_spans[LENGTH] == 8
        collate = MRopeCollator(None, SPEC)
        require_equal(collate([with_spans]), collate([padded]))

    def test_the_layout_of_batches(self) -> None:
        collate = MRopeCollator(None, SPEC, layout="batch")
        require_equal(collate(stored([SAMPLE])), collate([SAMPLE]))


class TestWhatIsStored:
    def test_a_small_batch_in_full(self) -> None:
        clip = {
            "input_ids": [START, *[VIDEO] * 2, 9, START, *[VIDEO] * 2],
            "video_grid_thw": [[2, 2, 4]],
        }
        columns = Precheck(SPEC)(columns_of_samples([SAMPLE, clip, {"input_ids": [7]}]))
        assert [spans.tolist() for spans in columns[SPANS]] == [
            [1, 2, 1, 2, 2],
            [2, 1, 1, 1, 2, 2, 5, 1, 1, 2],
            [],
        ]
        assert FIELDS == ("kind", "start", "frames", "height", "width")
        assert columns[LENGTH].tolist() == [8, 7, 1]
        assert columns[STAMP] == [stamp_of(SPEC)] * 3
        assert columns["input_ids"] == [SAMPLE["input_ids"], clip["input_ids"], [7]]

    def test_it_is_small(self) -> None:
        """Five numbers for an image of 64 x 64 tokens, where the positions are 3 x 4096."""
        sample = {"input_ids": [IMAGE] * 4096, "image_grid_thw": [[1, 128, 128]]}
        (with_spans,) = stored([sample])
        assert with_spans[SPANS].nbytes == 40

    def test_numpy_columns_as_ray_has_them(self) -> None:
        """Object arrays of arrays, one inside the other, read-only, NaN for a null."""
        grids = np.empty(1, np.object_)
        grids[0] = np.array([1, 4, 4])
        ids, images = np.empty(2, np.object_), np.empty(2, np.object_)
        ids[:] = [np.array(SAMPLE["input_ids"]), np.array([7, 8])]
        ids[0].flags.writeable = False
        images[:] = [grids, np.float32(np.nan)]
        columns = Precheck(SPEC)({"input_ids": ids, "image_grid_thw": images})
        examples = examples_of(columns)
        assert list(examples[1]) == ["input_ids", *COLUMNS]
        collate = MRopeCollator(None, SPEC)
        require_equal(collate(examples), collate([SAMPLE, {"input_ids": [7, 8]}]))

    def test_a_column_of_nulls_alone_is_not_made_one_of_numbers(self) -> None:
        nulls = np.full(2, np.nan, np.float32)
        columns = {"input_ids": np.array([[7], [8]]), "image_grid_thw": nulls, "score": nulls}
        result = Precheck(SPEC)(columns)
        assert result["image_grid_thw"] == [None, None] and result["score"] is nulls

    def test_arrow_tables_keep_their_columns_and_types(self) -> None:
        ids = pa.array([[7, 8], SAMPLE["input_ids"]], pa.list_(pa.int32()))
        grids = pa.array([None, [[1, 4, 4]]])
        table = pa.table({"input_ids": ids, "image_grid_thw": grids, "x": ["a", "b"]})
        result = Precheck(SPEC)(table)
        assert result.select(table.column_names).equals(table)
        assert result[SPANS].to_pylist() == [[], [1, 2, 1, 2, 2]]
        assert result[SPANS].type == pa.list_(pa.int64())
        assert Precheck(SPEC)(result).equals(result)
        assert Precheck(SPEC)(table.slice(0, 0)).schema.equals(result.schema)

    def test_the_stage_is_plain_data(self) -> None:
        stage = pickle.loads(pickle.dumps(Precheck(SPEC, VisionSpec(2))))
        assert stage.spec == SPEC and stage.vision == VisionSpec(2)
        columns = columns_of_samples([SAMPLE])
        assert stage(columns)[SPANS][0].tolist() == [1, 2, 1, 2, 2]
        assert list(columns) == list(SAMPLE)  # not written to


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"family": "qwen3_5"}, "qwen3_5 transformers-5.23 image=102"),
            ({"reference": "transformers-5.17"}, "qwen3_vl transformers-5.17 image=102"),
            ({"image_token_id": 555}, "image=555"),
            ({"spatial_merge_size": 1}, "merge=1"),
        ],
    )
    def test_spans_of_another_spec(self, change: dict[str, Any], message: str) -> None:
        import dataclasses

        samples = stored([SAMPLE])
        collate = MRopeCollator(None, dataclasses.replace(SPEC, **change))
        with pytest.raises(MRopeError, match="row 0: its spans were stored for another") as caught:
            collate(samples)
        assert stamp_of(SPEC) in str(caught.value) and message in str(caught.value)

    def test_what_a_spec_holds_is_in_its_stamp(self) -> None:
        stamps = {stamp_of(spec_of(row)) for row in SPAN_ROWS}
        assert len(stamps) == len(SPAN_ROWS)
        assert "temporal_merge_size=2" in stamp_of(
            spec_of(("ernie4_5_vl_moe", "transformers-5.23"))
        )

    @pytest.mark.parametrize("keep", [7, 4])  # after the image, and within it
    def test_truncated_rows(self, keep: int) -> None:
        whole, cut = stored([SAMPLE, SAMPLE])
        cut = {**cut, "input_ids": cut["input_ids"][:keep]}
        with pytest.raises(
            MRopeError, match=f"row 1: {keep} valid tokens, but 8 when .*truncation"
        ):
            MRopeCollator(None, SPEC)([whole, cut])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"input_ids": [START, *[IMAGE] * 4, 7, 8, 9]},
                MRopeError,
                "row 0: its tokens and grids have 1 spans, but 1 were stored; span 0 is an image of "
                "1 x 2 x 2 tokens at token 1, but was an image of 1 x 2 x 2 tokens at token 2",
            ),
            (
                {"image_grid_thw": [[1, 2, 8]]},
                MRopeError,
                "span 0 is an image of 1 x 1 x 4 tokens at token 2, but was",
            ),
            (
                {"input_ids": [7] * 8, "image_grid_thw": None},
                MRopeError,
                "have 0 spans, but 1 were stored; span 0 is not there, but was",
            ),
            (
                {"input_ids": [7, START, IMAGE, 7, IMAGE, IMAGE, IMAGE, IMAGE]},
                SpanMismatchError,
                "row 0, image 0: found 1 placeholder token, but its grid",
            ),
            ({"image_grid_thw": [[1, 8, 8]]}, SpanMismatchError, "found 4 placeholder tokens"),
            ({"mm_token_type_ids": [0] * 8}, SpanMismatchError, "mm_token_type_ids says 0"),
            ({SPANS: [1, 2, 1, 2]}, MRopeError, "not 5 numbers for each span"),
            ({SPANS: [1, -2, 1, 2, 2]}, MRopeError, "but was an image of 1 x 2 x 2 tokens at"),
            ({SPANS: [1, 7, 1, 2, 2]}, MRopeError, "but was an image of 1 x 2 x 2 tokens at"),
            ({SPANS: [3, 2, 1, 2, 2]}, MRopeError, "but was of kind 3"),
            ({SPANS: [1, 2, 1, 2, 2] * 2}, MRopeError, "have 1 spans, but 2 were stored"),
            (
                {SPANS: [1, 2, 1, 2, 2] * 2, "image_grid_thw": [[1, 4, 4]] * 2},
                SpanMismatchError,
                "row 0, image 1: found 0 placeholder tokens",
            ),
        ],
    )
    def test_samples_that_were_changed(
        self, change: dict[str, Any], error: type[MRopeError], message: str
    ) -> None:
        (sample,) = stored([SAMPLE])
        with pytest.raises(error, match=re.escape(message)):
            MRopeCollator(None, SPEC)([{**sample, **change}])

    def test_a_start_marker_that_was_lost(self) -> None:
        """Only 4.57 finds spans by it; there the image would be numbered as text."""
        spec = spec_of(("qwen2_vl", "transformers-4.57"))
        (sample,) = stored([SAMPLE], spec)
        with pytest.raises(SpanMismatchError, match="no vision start token"):
            MRopeCollator(None, spec)([{**sample, "input_ids": [7, 7, *SAMPLE["input_ids"][2:]]}])

    def test_rows_that_the_inner_function_reorders_or_drops(self) -> None:
        samples = stored([SAMPLE, {"input_ids": [7]}])
        backwards = MRopeCollator(lambda rows: PaddingCollator()(rows[::-1]), SPEC)
        with pytest.raises(MRopeError, match="row 0: 1 valid tokens, but 8 .* reorders rows"):
            backwards(samples)
        shorter = MRopeCollator(lambda rows: PaddingCollator()(rows[:1]), SPEC)
        with pytest.raises(MRopeError, match="stored for 2 examples, but .* made 1 rows"):
            shorter(samples)

    def test_a_cut_sample_is_skipped_like_any_other_bad_one(self) -> None:
        whole, cut = stored([SAMPLE, SAMPLE])
        cut["input_ids"] = cut["input_ids"][:7]
        collate = MRopeCollator(None, SPEC, on_error="skip")
        with pytest.warns(RejectWarning, match="7 valid tokens, but 8"):
            batch = collate([whole, cut])
        require_equal(batch, MRopeCollator(None, SPEC)([SAMPLE]))

    def test_families_without_spans_and_towers_of_other_models(self) -> None:
        with pytest.raises(MRopeError, match="qwen2_5_omni_thinker has a rule of its own"):
            Precheck(spec_of(("qwen2_5_omni_thinker", "transformers-5.23")))
        with pytest.raises(MRopeError, match="merges 4 patches along each side, but the spec 2"):
            Precheck(SPEC, VisionSpec(4))
        with pytest.raises(TypeError, match="must be an MRopeSpec, not dict"):
            Precheck(example_config("qwen3_vl"))  # type: ignore[arg-type]


class TestTheCollator:
    def test_the_inner_function_sees_no_stored_column_and_examples_keep_theirs(self) -> None:
        seen: list[list[str]] = []

        def inner(examples: Any) -> Any:
            seen.extend(list(example) for example in examples)
            return PaddingCollator()(examples)

        samples = stored([SAMPLE])
        batch = MRopeCollator(inner, SPEC)(samples)
        assert seen == [list(SAMPLE)]
        assert not set(COLUMNS) & set(batch) and set(COLUMNS) <= set(samples[0])

    def test_a_batch_with_a_sample_that_has_nothing_stored(self) -> None:
        collate = MRopeCollator(None, SPEC)
        mixed = [*stored([SAMPLE]), dict.fromkeys(COLUMNS) | SAMPLE, SAMPLE]
        require_equal(collate(mixed), collate([SAMPLE] * 3))

    def test_spans_are_read_and_not_found_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        samples = stored(plain_samples(9))
        monkeypatch.setattr("mrope.positions.rope_index.find_runs", None)
        monkeypatch.setattr("mrope.positions.stored.find_runs", None)
        MRopeCollator(None, SPEC)(samples)
        with pytest.raises(TypeError):
            MRopeCollator(None, SPEC)(plain_samples(9))


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
            SpanMismatchError, match=r"^row 2 of a batch whose place .*with_indices=True"
        ):
            Precheck(SPEC)(self.columns())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input_ids": None}, "no input_ids: the entry is null"),
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
            ({"second_per_grid_ts": [1.0, 1.0]}, "but the batch has 1 videos"),
            ({"second_per_grid_ts": [1.0], "video_second_per_grid": [2.0]}, "there and differ"),
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


def spans_of(table: Any) -> list[list[int]]:
    return [np.asarray(spans).tolist() for spans in table[SPANS]]


class TestDatasets:
    """`datasets.Dataset.map` and `IterableDataset.map`; the first batches hold text only."""

    table = datasets.Dataset.from_list(plain_samples(40)).with_format(None)
    spans = tuple(one[SPANS].tolist() for one in stored(plain_samples(40)))

    @pytest.mark.parametrize("processes", [None, 2])
    @pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow"])
    def test_map(self, form: str | None, processes: int | None) -> None:
        mapped = self.table.with_format(form).map(
            Precheck(SPEC), batched=True, batch_size=4, num_proc=processes
        )
        result = mapped.with_format(None)
        assert spans_of(result) == list(self.spans)
        assert result[STAMP][:] == [stamp_of(SPEC)] * 40
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
        spans = [np.asarray(row[SPANS]).tolist() for row in mapped.with_format(None)]
        assert spans == list(self.spans)

    def test_through_parquet_to_batches_of_a_budget(self, tmp_path: Path) -> None:
        mapped = self.table.map(Precheck(SPEC), batched=True)
        mapped.to_parquet(tmp_path / "rows.parquet")
        again = datasets.Dataset.from_parquet(
            str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path)
        )
        sampler = TokenBudgetSampler(again[LENGTH], 64, seed=1)
        collate = MRopeCollator(None, SPEC)
        for places in sampler:
            ours = collate([again[place] for place in places])
            require_equal(ours, collate([self.table[place] for place in places]))

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
