"""`mrope check`: every row looked at, what is said of it, and in which place."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from mrope import MRopeSpec
from mrope.check.report import Check, describe_verdict, list_other_rows, print_report
from mrope.check.row_layout import Misfit
from mrope.check.rows import CheckedRows, Examples, RowCheck, describe_comparison
from mrope.check.source import check_config, open_rows
from mrope.check.summary import EXAMPLES, Findings, check_rows
from mrope.spec import example_config
from mrope.training.sections import ConfigError
from support.checked import CUT, GOOD, SPEC, STRAY, Folder, Row, grown, sprinkled
from support.fresh import run_python
from support.malformed import IMAGE, MALFORMED, SMALL, Malformed, image, video
from support.specs import example_spec

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def look(row: Mapping[str, Any], spec: MRopeSpec = SPEC, *, compare: bool = False) -> RowCheck:
    return CheckedRows([row], spec, compare=compare)[0]


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


# What is counted, and what the command exits with.


def test_a_good_dataset_is_counted_and_compared(folder: Folder) -> None:
    rows = [GOOD, {"input_ids": [7, 8]}, grown(4)]
    json_file = folder.path / "found.json"
    assert folder.check(rows, "--workers", "0", "--json", str(json_file)) == 0
    tokens = [len(row["input_ids"]) for row in rows]
    assert folder.said("rows") == "3, 0 bad"
    assert folder.said("tokens") == str(sum(tokens))
    counts = [folder.said(name) for name in ("images", "videos", "frames")]
    assert counts == ["2", "2", "4"]
    assert folder.said("longest") == f"row 2, {tokens[2]} tokens"
    assert folder.said(
        "lengths"
    ) == f"min 2, p50 {tokens[0]}, p90 {tokens[2]}, p99 {tokens[2]}, " + (f"max {tokens[2]}")
    assert folder.said("compared") == "3 good rows, all equal"
    assert folder.out.endswith("3 rows, none bad\n")
    found = json.loads(json_file.read_text(encoding="utf-8"))
    assert (found["rows"], found["of"], found["bad"], found["tokens"]) == (3, 3, 0, sum(tokens))
    assert found["longest"] == {"row": 2, "tokens": tokens[2]}
    assert (found["compared"], found["causes"], found["stopped"]) == (3, [], None)


def test_bad_rows_are_listed_by_cause_and_the_exit_code_is_1(folder: Folder) -> None:
    json_file = folder.path / "found.json"
    rows = [GOOD, *[CUT] * 20, GOOD, STRAY]
    assert folder.check(rows, "--workers", "0", "--json", str(json_file)) == 1
    assert (
        "20 rows: the row ends inside it: truncated at max_length after the processor ran\n"
        "  row 1: image 0: found 2 placeholder tokens, but its grid [1, 4, 4], merged by 2, needs 4.\n"
    ) in folder.out
    assert "  and rows 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17 and 3 more\n" in folder.out
    assert "  row 22: video 0: found 1 placeholder token, but has no grid.\n" in folder.out
    assert folder.out.endswith("21 of 23 rows are bad\n")
    found = json.loads(json_file.read_text(encoding="utf-8"))
    assert [cause["rows"] for cause in found["causes"]] == [[*range(1, 21)], [22]]
    first = found["causes"][0]["examples"]
    assert [example["row"] for example in first] == [1, 2, 3, 4, 5]
    assert first[0]["message"].endswith(f"Likely cause: {found['causes'][0]['cause']}.")
    assert first[0]["layout"]["misfit"] == {"start": 2, "found": 2, "needed": 4}


def test_a_limit_leaves_the_rest_alone(folder: Folder) -> None:
    assert folder.check([GOOD, GOOD, CUT], "--workers", "0", "--limit", "2") == 0
    assert folder.said("rows") == "2, 0 bad"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check"], "give --model and --dataset, or --config"),
        (["check", "--model", "{model}"], "give --model and --dataset, or --config"),
        (["check", "--model", "nowhere", "--dataset", "{rows}"], "--model: no config at"),
        (["check", "--model", "{model}", "--dataset", "nowhere"], "--dataset: nothing at"),
        (
            ["check", "--model", "{model}", "--dataset", "{model}"],
            "config.json has the columns",
        ),
        (["check", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (
            ["check", "--model", "{model}", "--dataset", "{rows}", "--reference", "5.23"],
            "--reference: must be one of auto, transformers-4.57",
        ),
        (["check", "--config", str(DEMO), "--json", "no/such/x.json"], "no folder no/such"),
        (["check", "--config", str(DEMO), "--limit", "0"], "Invalid value for '--limit'"),
        (["explain", "--row", "0"], "give --model and --dataset, or --config"),
        (["explain", "--row", "0", "text:3"], "--row takes no SPAN"),
        (["explain", "--config", str(DEMO)], "give SPANs and --family, or --row"),
        (
            ["explain", "--model", "{model}", "--dataset", "{rows}", "--row", "1"],
            "there is no row 1",
        ),
    ],
)
def test_wrong_calls_exit_with_2(folder: Folder, words: list[str], message: str) -> None:
    paths = {"model": str(folder.model), "rows": str(folder.dataset([GOOD]))}
    assert folder.run(*(word.format(**paths) for word in words)) == 2
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", folder.err).split())
    assert message in said
    assert folder.out == ""


def test_a_dataset_without_rows_or_without_tokens_is_a_wrong_call(folder: Folder) -> None:
    import datasets

    options = ("check", "--model", str(folder.model), "--dataset")
    empty, other = str(folder.path / "empty"), str(folder.path / "other")
    datasets.Dataset.from_dict({"input_ids": []}).save_to_disk(empty)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(other)
    for nothing in (empty, str(folder.dataset([]))):
        assert folder.run(*options, nothing) == 2
        assert f"{nothing} has no rows" in folder.err
    assert folder.run(*options, other) == 2
    assert "has the columns text; a dataset needs input_ids" in folder.err


def test_made_up_rows_are_not_checked(folder: Folder) -> None:
    config = folder.path / "run.yaml"
    text = "model: {config: config.json}\ndata: {source: synthetic, shape: {width: 9}}\n"
    config.write_text(text, encoding="utf-8")
    assert folder.run("check", "--config", str(config)) == 2
    assert "made up" in folder.err


def test_the_report_needs_jinja2_and_says_so() -> None:
    words = ["check", "--config", str(DEMO), "--report", "x.html"]
    code = f"import sys; sys.modules['jinja2'] = None\nfrom mrope.cli import main; main({words!r})"
    done = run_python(code)
    assert done.returncode == 2
    assert done.stderr == "mrope: no module 'jinja2'; pip install 'mrope[cli]'\n"


# Where the config comes from.


def test_the_command_line_wins_over_the_config(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = folder.path / "a: b, [c] = 'd'"
    odd.mkdir()
    shutil.copy(folder.model, odd)
    rows = folder.dataset([GOOD])
    monkeypatch.chdir(odd)
    cfg = check_config(DEMO, ".", "../rows.jsonl", reference="transformers-5.17", rows=1)
    assert Path(str(cfg.model.config)).resolve() == odd.resolve()
    assert Path(cfg.data.source).resolve() == rows.resolve()
    assert (cfg.rope.reference, cfg.data.rows, cfg.trainer["max_steps"]) == (
        "transformers-5.17",
        1,
        20,
    )


def test_without_a_config_the_command_line_is_all_there_is(folder: Folder) -> None:
    cfg = check_config(None, str(folder.model), "demo")
    assert (cfg.data.source, cfg.rope.reference, cfg.data.rows) == ("demo", "auto", None)
    with pytest.raises(ConfigError, match=r"^the command line: 1 problem\n  --dataset: nothing"):
        check_config(None, str(folder.model), "nowhere")


# Each malformed sample.


def rows_of(case: Malformed) -> list[Row]:
    """Return a case's rows as a dataset has them: unpadded, each with its own grids."""
    masks = case.arguments["attention_mask"]
    # A dataset's row has its own grids; where the batch does not say, the first row has the extra.
    grids = list(case.arguments.get("image_grid_thw", []))
    counts = (
        case.arguments.get("images_per_sample") or [len(grids) - len(masks) + 1, 1][: len(masks)]
    )
    types = case.arguments.get("mm_token_type_ids")
    rows = []
    for index, (ids, mask) in enumerate(zip(case.arguments["input_ids"], masks, strict=True)):
        row: Row = {"input_ids": ids[: sum(mask)], "image_grid_thw": grids[: counts[index]]}
        grids = grids[counts[index] :]
        row |= {"video_grid_thw": case.arguments.get("video_grid_thw")}
        rows.append(row | ({"mm_token_type_ids": types[index]} if types else {}))
    return rows


# Of each malformed sample: first wrong token, tokens found, tokens needed.
MISFITS = {
    "truncated inside an image": (9, 10, 16),
    "truncated before an image": (8, 0, 16),
    "truncated on the left": (0, 3, 4),
    "one grid missing": (7, 16, 0),
    "stray image placeholder": (1, 1, 4),
    "sampled video placeholder": (7, 1, 0),
    "one row lost an image, rows counted": (8, 0, 4),
    "one row lost an image, rows not counted": (8, 0, 4),
    "two rows swapped grids of one size": (8, 4, 0),
    "one token per patch": (2, 16, 4),
    "video frames that do not match": (15, 0, 4),
    "types and tokens disagree": (3, 1, None),
    "no vision start in front, transformers 4.57": (1, 4, None),
}


def test_every_malformed_sample_is_expected_somewhere() -> None:
    known = {case.name for case in MALFORMED if case.family == "qwen3_vl"}
    # A row of a dataset has grids of its own, which are never matched with another row's frames.
    assert set(MISFITS) == known - {"a clip whose frames stand in two rows"}


@pytest.mark.parametrize("name", MISFITS)
def test_each_malformed_sample_is_found_in_its_place(name: str) -> None:
    (case,) = [case for case in MALFORMED if case.name == name]
    spec = example_spec(case.family, case.reference)
    rows = [GOOD, GOOD, *rows_of(case), GOOD]
    summary = check_rows(CheckedRows(rows, spec))
    assert (summary.rows, summary.stopped) == (len(rows), None)
    bad_rows = {one.row: one for found in summary.causes.values() for one in found.examples}
    assert min(bad_rows) == 2 and max(bad_rows) < len(rows) - 1
    bad = bad_rows[2]
    if case.row is not None:
        assert f"row 0, {bad.message}" == case.message
    assert str(bad.message).endswith(f"Likely cause: {bad.cause}.")
    assert bad.layout is not None
    assert bad.layout.misfit == Misfit(*MISFITS[name])


BROKEN: list[tuple[Row, str, str]] = [
    ({"input_ids": None}, "no input_ids: the column is missing or null", "no input_ids"),
    (
        {**GOOD, "image_grid_thw": [SMALL, [1, 4]]},
        "image_grid_thw is ragged, or holds something other than numbers",
        "image_grid_thw is ragged",
    ),
    (
        {**GOOD, "input_ids": [7, None, 8]},
        "input_ids must hold integers, not float32",
        "input_ids must hold integers",
    ),
    (
        {**GOOD, "image_grid_thw": [[1, 3, 4]]},
        "image_grid_thw[0] = [1, 3, 4]: height and width",
        "a grid of another processor",
    ),
    (
        {**GOOD, "image_grid_thw": [[1, -4, 4]]},
        "image_grid_thw[0] = [1, -4, 4]: every size must be at least 1",
        "image_grid_thw[N] = [N, N, N]: every size must be at least N",
    ),
    (
        {**GOOD, "attention_mask": [1, 1]},
        "attention_mask has shape (1, 2), but input_ids",
        "one of them was truncated or padded",
    ),
    ({**GOOD, "labels": [1, 1]}, "2 labels, but 21 input_ids", "one of them was truncated"),
]


@pytest.mark.parametrize(("row", "message", "cause"), BROKEN, ids=lambda value: str(value)[:40])
def test_broken_columns_are_bad_rows_too(
    folder: Folder, row: Row, message: str, cause: str
) -> None:
    """Through a file, so that nulls and lists are what the table makes of them."""
    cfg = check_config(None, str(folder.model), str(folder.dataset([GOOD, row, GOOD])))
    summary = check_rows(open_rows(cfg))
    ((found_cause, found),) = summary.causes.items()
    assert list(found.rows) == [1]
    assert str(found.examples[0].message).startswith(message)
    assert found_cause.startswith(cause)
    assert summary.rows == 3


def test_a_row_that_raises_anything_does_not_stop_the_walk() -> None:
    class Torn(list[Row]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

    summary = check_rows(CheckedRows(Torn([GOOD] * 3), SPEC))
    assert (summary.rows, summary.bad) == (3, 1)
    ((cause, found),) = summary.causes.items()
    assert cause == "the row cannot be read: OSError"
    assert found.examples[0].message == "OSError: image file is truncated"
    assert found.examples[0].layout is None


# Conversations, processed row by row.


def test_conversations_are_processed_where_they_are_checked(folder: Folder) -> None:
    from mrope.training.demo.dataset import photographs

    table = photographs(6)

    def spoil(row: Row, index: int) -> Row:
        return {"images": row["images"] * (2 if index == 1 else 1)}

    place = str(folder.path / "talks")
    table.map(spoil, with_indices=True, features=table.features).save_to_disk(place)
    words = ("check", "--config", str(DEMO), "--dataset", place, "--workers", "0")
    assert folder.run(*words) == 1
    assert folder.said("rows") == "6, 1 bad"
    assert folder.said("compared") == "5 good rows, all equal"
    assert re.search(
        r"  row 1: its messages show \d images, but its column holds \d \(", folder.out
    )
    whole = tuple("demo" if word == place else word for word in words)
    assert folder.run(*whole, "--limit", "6") == 0
    assert folder.said("rows") == "6, 0 bad"


# Compared with the reference.


def test_seconds_are_compared_as_the_model_would_have_them(folder: Folder) -> None:
    pytest.importorskip("transformers")
    folder.model.write_text(json.dumps(example_config("qwen2_5_vl")), encoding="utf-8")
    row = {
        "input_ids": [7, *video(12), 8],
        "video_grid_thw": [[3, 4, 4]],
        "second_per_grid_ts": [2 / 3],
    }
    assert folder.check([row, {**row, "second_per_grid_ts": [0.1]}]) == 0
    assert folder.said("compared") == "2 good rows, all equal"


@pytest.mark.parametrize("part", [0, 1])
def test_another_number_than_the_reference_s_is_a_bad_row(
    monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    from mrope.hf import get_rope_index as reference

    own = reference.reference_rope_index

    def other(spec: MRopeSpec, arguments: Mapping[str, Any]) -> Any:
        theirs = own(spec, arguments)
        theirs[part].reshape(-1)[3 if part == 0 else 0] += 1
        return theirs

    assert look(GOOD, compare=True).compared
    monkeypatch.setattr(reference, "reference_rope_index", other)
    found = look(GOOD, compare=True)
    assert found.cause == "position ids differ from transformers"
    assert not found.compared
    messages = (
        "valid token 3 has position [2, 2, 3], but transformers-5.23's own function gives [3, 2, 3]",
        "delta -6, but transformers-5.23's own function gives -5",
    )
    assert found.message == messages[part]
    assert found.layout is not None
    assert found.layout.misfit == Misfit(3 if part == 0 else len(GOOD["input_ids"]) - 1, 1, None)


def test_rows_that_only_the_reference_fails_on_are_good_and_named(folder: Folder) -> None:
    touching = {"input_ids": [7, *[IMAGE] * 8, 7], "image_grid_thw": [SMALL] * 2}
    assert folder.check([GOOD, touching]) == 0
    assert folder.said("compared") == "1 good row, all equal"
    assert re.fullmatch(r"1 row where that function raises \w+", folder.said("not compared"))


@pytest.mark.parametrize(
    ("installed", "reference", "family", "sentence"),
    [
        (None, "transformers-5.23", "qwen3_vl", "not compared: transformers is not installed"),
        (
            "5.23.0",
            "transformers-4.57",
            "qwen3_vl",
            "not compared: rows follow transformers-4.57, but transformers 5.23.0 is installed",
        ),
        (
            "5.3.0",
            "transformers-5.23",
            "qwen3_vl",
            "not compared: reference='auto' has no rule for",
        ),
    ],
)
def test_what_rows_are_compared_with_is_said(
    monkeypatch: pytest.MonkeyPatch,
    installed: str | None,
    reference: str,
    family: str,
    sentence: str,
) -> None:
    monkeypatch.setattr("mrope.check.rows.installed_transformers", lambda: installed)
    compared, said = describe_comparison(example_spec(family, reference))
    assert not compared
    assert said.startswith(sentence)


def test_rows_of_another_reference_are_checked_all_the_same(folder: Folder) -> None:
    words = ("--workers", "0", "--reference", "transformers-4.57")
    assert folder.check([GOOD, CUT], *words) == 1
    assert folder.said("rows") == "2, 1 bad"
    assert folder.said("reference").startswith("not compared: rows follow")
    assert "│ compared" not in folder.out


# In parallel, and ended early.


def test_workers_find_what_one_process_finds() -> None:
    rows = CheckedRows(sprinkled(150), SPEC)
    alone = check_rows(rows)
    assert alone.bad == sum(row is CUT or row is STRAY for row in sprinkled(150)) > 20
    parallel = check_rows(rows, 2, "fork")
    assert parallel == alone
    numbers = sorted(row for found in parallel.causes.values() for row in found.rows)
    assert numbers == [n for n in range(150) if n % 7 == 3 or n % 11 == 5]


def test_the_command_finds_the_same_with_a_spawned_worker(folder: Folder) -> None:
    """It compares with transformers, which it imports for itself."""
    outs = []
    for workers in ("0", "1"):
        assert folder.check(sprinkled(60), "--workers", workers) == 1
        outs.append(folder.out)
    assert outs[0] == outs[1]
    assert folder.said("compared").endswith("good rows, all equal")


class Ending(list[Row]):
    """Rows at one of which a process gets a signal: the one that reads, or the one above it."""

    def __init__(self, rows: int, at: int, number: int, parent: bool) -> None:
        super().__init__(sprinkled(rows))
        self.at, self.number, self.parent = at, number, parent

    def __getitem__(self, index: Any) -> Any:
        if index == self.at:
            os.kill(os.getppid() if self.parent else os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_shows_what_was_found_so_far(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    examples = Ending(10_000, at=200, number=signal.SIGINT, parent=workers > 0)
    rows = CheckedRows(examples, SPEC)
    monkeypatch.setattr("mrope.check.commands.open_rows", lambda cfg, compare: rows)
    words = ("--workers", str(workers), "--config", str(folder.forking))
    assert folder.check([GOOD], *words) == 130
    done = re.fullmatch(r"([\d,]+) of 10,000, (\d+) bad", folder.said("rows"))
    assert done is not None
    seen = int(done[1].replace(",", ""))
    assert 0 < seen < 10_000
    assert workers or seen == 192
    bad = sum(n % 7 == 3 or n % 11 == 5 for n in range(seen))
    assert int(done[2]) == bad
    assert folder.out.endswith(f"{bad} of {seen:,} rows are bad; stopped early: interrupted\n")


def test_a_dead_worker_ends_the_walk_with_what_was_found(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = CheckedRows(Ending(400, at=200, number=signal.SIGKILL, parent=False), SPEC)
    monkeypatch.setattr("mrope.check.commands.open_rows", lambda cfg, compare: rows)
    assert folder.check([GOOD], "--workers", "1", "--config", str(folder.forking)) == 2
    done = re.fullmatch(r"(\d+) of 400, \d+ bad", folder.said("rows"))
    assert done is not None
    # Batches of 16 rows arrive up to row 192; the last may die with the worker, in its queue.
    assert 0 < int(done[1]) <= 192
    assert re.search(
        rf"the check stopped after {done[1]} rows: DataLoader worker .*(killed by signal|exited)",
        folder.err,
    )


# `mrope explain --row`.


def test_explain_shows_a_good_row(folder: Folder) -> None:
    rows = str(folder.dataset([CUT, {"input_ids": [7, *image(4), 8], "image_grid_thw": [SMALL]}]))
    words = ("explain", "--model", str(folder.model), "--dataset", rows, "--row")
    assert folder.run(*words, "1") == 0
    lines = [line.strip("│").split("│") for line in folder.out.splitlines() if line[0] == "│"]
    cells = [[cell.strip() for cell in line] for line in lines]
    kinds = ["text", "start", *["image"] * 4, "text", "text"]
    assert [cell[1] for cell in cells] == kinds
    assert cells[5] == ["5", "image", "2", "3", "3"]
    assert "delta -2" in folder.out


def test_explain_shows_where_a_bad_row_goes_wrong(folder: Folder) -> None:
    lost = {"input_ids": [7, *image(4), 8], "image_grid_thw": [SMALL] * 2}
    rows = str(folder.dataset([CUT, lost, {"input_ids": None}]))
    words = ("explain", "--model", str(folder.model), "--dataset", rows, "--row")
    assert folder.run(*words, "0") == 1
    assert re.search(r"│ 2 +│ 3 +│ image │ 2 +│ 2 from 2: its grid needs 4 │", folder.out)
    assert "row 0: image 0: found 2 placeholder tokens" in folder.out
    assert folder.run(*words, "1") == 1
    assert re.search(r"│ 8 +│ +│ missing │ 0 +│ 0 from 8: its grid needs 4 │", folder.out)
    assert folder.run(*words, "2") == 1
    assert folder.out == "row 2: no input_ids: the column is missing or null\n"


def test_explain_leaves_padding_out(folder: Folder) -> None:
    row = {"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]}
    rows = str(folder.dataset([row]))
    options = ("--model", str(folder.model), "--dataset", rows, "--row", "0")
    assert folder.run("explain", *options) == 0
    assert re.findall(r"^│ +(\d) │ text │ (\d) │ (\d) │ (\d) │$", folder.out, re.MULTILINE) == [
        ("0", "0", "0", "0"),
        ("1", "1", "1", "1"),
    ]


# Small parts.


def test_tensors_arrays_and_lists_are_the_same_row() -> None:
    frozen = np.array(GOOD["input_ids"])
    frozen.flags.writeable = False
    forms: list[Row] = [
        GOOD,
        {**GOOD, "input_ids": frozen},
        {name: torch.tensor(value) for name, value in GOOD.items()},
        {**GOOD, "input_ids": [GOOD["input_ids"]]},
        {**GOOD, "pixel_values": "not looked at", "labels": GOOD["input_ids"]},
    ]
    rows: Examples = forms
    summary = check_rows(CheckedRows(rows, SPEC, compare=True))
    assert (summary.bad, summary.compared) == (0, len(forms))
    assert summary.tokens == len(forms) * len(GOOD["input_ids"])


def test_only_the_first_rows_of_a_cause_are_kept_whole() -> None:
    found = Findings()
    for row in range(EXAMPLES + 1):
        found.add(RowCheck(row))
    assert (len(found.examples), len(found.rows)) == (EXAMPLES, EXAMPLES + 1)
    assert list_other_rows(found) == f"row {EXAMPLES}"


def test_a_dataset_without_a_good_row_has_no_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    summary = check_rows(CheckedRows([CUT], SPEC))
    assert summary.quantiles() == {}
    assert describe_verdict(summary) == "1 of 1 row is bad"
    print_report(Check("rows", SPEC, False, "not compared", summary, 0.0), Console())
    out = capsys.readouterr().out
    assert "longest" not in out and "lengths" not in out


def test_a_worker_imports_nothing_that_only_the_command_needs() -> None:
    code = (
        "import sys, mrope.check.rows, mrope.check.summary, mrope.check.source\n"
        "heavy = ('transformers', 'datasets', 'pydantic', 'rich', 'typer', 'jinja2')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python(code).stdout == "[]\n"


# The page of the docs.

PAGE = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
CALLS = re.findall(r"```shell-session\n\$ mrope ([^\n]*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("call", "shown"), CALLS)
def test_the_docs_show_what_is_printed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, call: str, shown: str
) -> None:
    pytest.importorskip("transformers")
    files = re.findall(r'```json title="(.*?)"\n(.*?)```', PAGE, re.DOTALL)
    assert [name for name, _ in files] == ["config.json", "rows.jsonl"]
    for name, text in files:
        (folder.path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder.path)
    monkeypatch.setenv("COLUMNS", "80")
    if "--replay" in call:  # of the files that the block before it writes
        (code,) = re.findall(r"## Compare two runs\n.*?```python\n(.*?)```", PAGE, re.DOTALL)
        (folder.path / "outputs").mkdir()
        exec(compile(code, "check.md", "exec"), {})
    assert folder.run(*call.split()) == 1
    assert [line.rstrip() for line in folder.out.splitlines()] == shown.splitlines()


def test_the_commands_stand_in_the_docs() -> None:
    assert [call.split()[0] for call, _ in CALLS] == ["check", "explain", "check"]
