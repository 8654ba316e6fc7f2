"""Run the command line by its entry point; check output, files and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import mrope
from mrope import MRopeError
from mrope.bench.harness import make_console, make_table
from mrope.check.explain import compute_positions, print_positions, save_plot
from mrope.cli import main
from mrope.spec import example_config
from support.fresh import run_python

SAMPLE = ["text:3", "image:4x6", "text:2", "video:2x4x4"]
DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")


class Command:
    """Run `mrope` in this process and keep its output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(words)
        self.out, self.err = self.capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code

    def rows(self) -> list[list[str]]:
        """Return the cells of the printed table's body."""
        lines = [line for line in self.out.splitlines() if line.startswith("│")]
        return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_version(command: Command) -> None:
    assert command("--version") == 0
    assert command.out == f"mrope {mrope.__version__}\n"


def test_explain_prints_every_token_of_a_short_sample(command: Command) -> None:
    assert command("explain", "--family", "qwen3_vl", *SAMPLE) == 0
    rows = command.rows()
    text, image, video = ["text"], ["start", *["image"] * 6], ["start", *["video"] * 4]
    assert [row[1] for row in rows] == [*text * 3, *image, *text * 2, *video * 2]
    assert [row[0] for row in rows] == [str(token) for token in range(22)]
    numbers = [list(map(int, row[2:])) for row in rows]
    assert numbers[2:10] == [
        [2, 2, 2], [3, 3, 3], [4, 4, 4], [4, 4, 5], [4, 4, 6], [4, 5, 4], [4, 5, 5], [4, 5, 6],
    ]  # fmt: skip
    assert numbers[10:14] == [[7, 7, 7], [8, 8, 8], [9, 9, 9], [10, 10, 10]]
    assert numbers[16:18] == [[10, 11, 11], [12, 12, 12]]
    assert numbers[21] == [13, 14, 14]
    assert "delta -7: the next token, number 22, has position 15" in command.out


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen3_vl", "text start video start video text"),
        ("glm4v", "text text start video start video text text"),  # markers around the clip
        ("ernie4_5_vl_moe", "text start video text"),  # two frames in one
        ("hy_v4_vl", "text video video video video text"),  # newline tokens are placeholders
        ("KeyeVL", "text video video text"),
        ("openpangu_vl", "text video text text video text"),  # a marker behind and one in front
    ],
)
def test_explain_lays_clips_out_as_the_family_does(family: str, kinds: str) -> None:
    sample = compute_positions(["text:1", "video:2x2x2", "text:1"], family, "transformers-5.23")
    assert sample.kinds == kinds.split()
    assert sum(sample.lengths) == len(sample.kinds) == sample.position_ids.shape[1]


def test_explain_makes_up_no_sample_of_a_rule_of_its_own() -> None:
    with pytest.raises(MRopeError, match="no sample of glm_image can be made up"):
        compute_positions(["image:4x4"], "glm_image", "transformers-5.23")


def test_explain_gives_a_whole_clip_one_marker_where_frames_stand_together() -> None:
    numbered = compute_positions(["video:3x4x4"], "qwen2_vl", "transformers-5.23")
    assert numbered.kinds == ["start", *["video"] * 12]
    assert numbered.position_ids[0].tolist() == [0, *[1] * 4, *[2] * 4, *[3] * 4]


@pytest.mark.parametrize(
    ("reference", "seconds", "time", "text"),
    [
        ("transformers-4.57", 0.5, [1, 1, 1], 3),
        ("transformers-5.23", 0.5, [1, 2, 3], 3),
        ("transformers-4.57", None, [1, 3, 5], 6),
        ("transformers-5.23", None, [1, 3, 5], 3),
    ],
)
def test_explain_follows_the_reference_and_the_seconds(
    reference: str, seconds: float | None, time: list[int], text: int
) -> None:
    numbered = compute_positions(["video:3x4x4", "text:1"], "qwen2_5_vl", reference, seconds)
    assert numbered.position_ids[0, 1:13:4].tolist() == time
    assert numbered.position_ids[:, -1].tolist() == [text] * 3


def test_explain_shortens_long_spans_unless_asked_for_all(command: Command) -> None:
    words = ("explain", "--family", "qwen3_vl", "text:1", "image:16x16", "text:1")
    assert command(*words) == 0
    short = command.rows()
    assert [row[0] for row in short] == [
        *map(str, range(7)), "...", *map(str, range(62, 67)),
    ]  # fmt: skip
    assert short[7][1] == "55 more"
    assert command(*words, "--all") == 0
    assert [row[0] for row in command.rows()] == [str(token) for token in range(67)]


def test_explain_colours_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    print_positions(
        compute_positions(SAMPLE, "qwen3_vl"), Console(force_terminal=True, color_system="standard")
    )
    out = capsys.readouterr().out
    assert re.search(r"\x1b\[36m[^\x1b]*image", out)
    assert re.search(r"\x1b\[35m[^\x1b]*video", out)


def test_explain_saves_a_picture(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "rows.png"
    assert command("explain", "--family", "qwen3_vl", *SAMPLE, "--plot", str(file)) == 0
    from matplotlib.image import imread

    pixels = imread(file)
    assert min(pixels.shape[:2]) > 300
    colours = {tuple(colour) for colour in pixels.reshape(-1, pixels.shape[2]).round(2).tolist()}
    assert len(colours) > 20


def test_a_picture_of_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MRopeError, match="cannot write the plot .*rows.nope"):
        save_plot(compute_positions(["text:1"], "qwen3_vl"), tmp_path / "rows.nope")


@pytest.mark.parametrize(
    "word",
    ["text", "text:", "text:0", "text:-1", "text:2x2", "image:4", "image:4x", "image:4x4x4",
     "video:4x4", "video:1x4xa", "audio:3", "image:4X4", ""],
)  # fmt: skip
def test_explain_refuses_malformed_words(command: Command, word: str) -> None:
    assert command("explain", "--family", "qwen3_vl", "text:1", word) == 2
    assert f"cannot read {word!r}: a span is text:N" in command.err
    assert command.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--family", "qwen3_v", "text:1"], "did you mean 'qwen3_vl'?"),
        (["--family", "qwen3_vl", "image:3x4"], "must be multiples of spatial_merge_size=2"),
        (["--family", "qwen3_vl", "text:1", "--reference", "4.57"], "unknown reference '4.57'"),
        (["--family", "qwen3_vl", "text:1", "--seconds", "0.5"], "qwen3_vl does not read seconds"),
        (["--family", "qwen2_5_vl", "video:1x4x4", "--seconds", "-1"], "must be finite"),
        (["--family", "qwen3_vl", "video:9999x999x999"], "more than 1,048,576 tokens"),
    ],
)
def test_explain_refuses_wrong_values(command: Command, words: list[str], message: str) -> None:
    assert command("explain", *words) == 2
    assert message in command.err


def test_errors_are_one_message_without_a_traceback(command: Command) -> None:
    assert command("train", "no/such.yaml") == 2
    assert command.err == "mrope: no/such.yaml: cannot be read: No such file or directory\n"


def test_an_error_is_red_on_a_terminal() -> None:
    # In a process of its own, which no other test has printed in.
    words = [sys.executable, "-m", "mrope", "explain", "--family", "qwen3_vl", "[bold]:3"]
    env = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("\x1b[31mmrope: cannot read '[bold]:3'")


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["explain", "--family", "qwen3_vl"],
        ["bench", "positions", "--repeats", "0"],
        ["bench", "positions", "--json", "no/such/folder/x.json"],
        ["bench", "step", "trainer.max_steps=3"],
        ["bench", "stage", "trainer.max_steps=3"],
        ["bench", "step", DEMO, "--device", "abacus"],
        ["bench", "positions", "--plot", "x.nope"],
        ["explain", "--family", "qwen3_vl", "text:1", "--plot", "x"],
        ["syncs"],
        ["syncs", DEMO, "--model", "somewhere"],
        ["syncs", DEMO, DEMO],
    ],
)
def test_wrong_usage_exits_with_2(command: Command, words: list[str]) -> None:
    assert command(*words) == 2
    assert "Usage" in command.err


NO_GPU = "trainer.use_cpu is false, but torch sees no CUDA device: set it to true, or install a"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", DEMO, "--device", "cuda"], NO_GPU),
        (["train", DEMO, "trainer.use_cpu=false", "--compare"], NO_GPU),
        (["bench", "step", DEMO, "--device", "cuda"], "the device is cuda, but torch sees no CUDA"),
        (
            ["train", DEMO, "trianer.max_steps=3"],
            "  trianer: unknown key (did you mean 'trainer'?); kno",
        ),
        (["train", DEMO, "trainer.seed"], "'trainer.seed': must be key.of.section=value"),
        (["train", DEMO, "model.config=Qwen/Q"], "Q; give a config.json or the local folder that"),
        (["train", DEMO, "model.config=."], "  model.config: no config at "),
        (["train", DEMO, "data.source=no.jsonl"], "  data.source: nothing at "),
        (["train", DEMO, "rope.reference=4.57"], "transformers-5.23, not 4.57"),
        (
            ["train", DEMO, "rope.pad_to_multiple_of=8"],
            "\n  rope.pad_to_multiple_of needs rope.pac",
        ),
        (["check", "--model", "nowhere", "--dataset", "demo"], "  --model: no config at nowhere;"),
        (["syncs", "--model", "nowhere"], "  model.config: no config at nowhere; give"),
        (["syncs", "--model", "nowhere", "trainer.seed=1"], "--model takes no trainer.seed=1"),
    ],
)
def test_wrong_input_exits_with_2_before_anything_runs(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command(*words) == 2
    assert command.err.startswith("mrope: ") and message in command.err
    assert command.out == ""


def test_a_dataset_that_cannot_be_parsed_says_why(command: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2]')
    assert command("train", DEMO, f"data.source={rows}") == 2
    message = command.err.splitlines()[-1]
    assert message.startswith(f"mrope: data.source: {rows} cannot be read: ")
    assert "JSON" in message


def test_a_config_without_a_tokenizer_says_so(command: Command, tmp_path: Path) -> None:
    rows, model = tmp_path / "rows.jsonl", tmp_path / "config.json"
    rows.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    model.write_text(json.dumps(example_config("qwen3_vl")))
    assert command("check", "--model", str(model), "--dataset", str(rows)) == 2
    assert "no tokenizer_config.json beside the model's config" in command.err
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert command("check", "--model", str(model), "--dataset", str(rows)) == 2
    assert f"{tmp_path}" in command.err and "processor" in command.err
    (tmp_path / "tokenizer_config.json").unlink()
    assert command("check", "--model", str(model), "--dataset", "demo") == 2
    assert "no processor is given (data.processor, or the model's folder), and" in command.err


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_train_compares(
    command: Command, monkeypatch: pytest.MonkeyPatch, equal: bool, code: int
) -> None:
    seen = []

    def compare(cfg: Any) -> bool:
        seen.append(cfg.trainer["max_steps"])
        return equal

    monkeypatch.setattr("mrope.training.compare.compare", compare)
    assert command("train", DEMO, "trainer.max_steps=3", "--compare") == code
    assert seen == [3]


def test_train_hands_the_config_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(cfg: Any, resume: bool) -> Any:
        seen.append((cfg.rope.enabled, cfg.trainer["use_cpu"], resume))
        return SimpleNamespace(stopped=resume)

    monkeypatch.setattr("mrope.training.trainer.train", train)
    assert command("train", DEMO, "rope.enabled=false", "--device", "cpu") == 0
    assert command("train", DEMO, "--resume", "--device", "auto") == 130
    assert seen == [(False, True, False), (True, True, True)]


def test_bench_step_and_syncs_tell_configs_from_overrides(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(*arguments: Any, **options: Any) -> None:
        seen.append((*arguments, *options.values()))

    monkeypatch.setattr("mrope.bench.step.bench_step", record)
    monkeypatch.setattr("mrope.check.syncs.print_step_syncs", record)
    words = ("a.yaml", "trainer.seed=1", "b.yaml")
    assert command("bench", "step", *words, "--device", "cpu", "--steps", "4") == 0
    assert command("bench", "step", "a.yaml", "--variants", "plain,layers") == 0
    assert command("syncs", "a.yaml", "trainer.seed=1") == 0
    assert command("syncs", "--model", "folder") == 0
    assert seen == [
        ([Path("a.yaml"), Path("b.yaml")], ["trainer.seed=1"], "cpu", 4, None, None, None),
        ([Path("a.yaml")], [], "auto", 20, None, None, ["plain", "layers"]),
        (Path("a.yaml"), ["trainer.seed=1"], None),
        (None, [], "folder"),
    ]


def test_bench_positions_writes_json(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "positions.json"
    words = ("bench", "positions", "--quick", "--repeats", "1", "--json", str(file))
    assert command(*words) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["repeats"] == 1
    assert len(report["cases"]) == 3
    assert all(entry["seconds"]["kernel"] > 0 for entry in report["cases"])
    measured = [*report["cases"], *report["sweep"]]
    assert [row[0] for row in command.rows()] == [entry["name"] for entry in measured]
    assert all(len(row) == 7 and all(row) for row in command.rows())


@pytest.mark.parametrize("columns", ["20", "500"])
def test_bench_tables_do_not_wrap_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Times of any length, and a terminal of any width around the pipe."""
    monkeypatch.setenv("COLUMNS", columns)
    table = make_table("title", ("case",), [f"number {index}" for index in range(8)])
    cells = ["B=8 S=32k, 16 images + 16 videos of 32", *["123,456,789,012 µs"] * 8]
    table.add_row(*cells)
    make_console().print(table)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in line.strip("│").split("│")] == cells


def _without(package: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `mrope` in a process that cannot import `package`."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from mrope.cli import main; main({list(words)!r})"
    )
    return run_python(code)


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [
        ("typer", ["--version"], "cli"),
        ("pydantic", ["train", DEMO], "cli"),
        ("transformers", ["train", DEMO], "train"),
        ("datasets", ["train", DEMO], "train"),
        ("accelerate", ["train", DEMO], "train"),
        ("peft", ["train", DEMO, "peft.r=4", "data.rows=5"], "train"),
        ("matplotlib", ["bench", "positions", "--plot", "x.png"], "plot"),
    ],
)
def test_a_missing_extra_is_named(package: str, words: list[str], extra: str) -> None:
    done = _without(package, *words)
    assert done.returncode == 2
    assert done.stderr == f"mrope: no module {package!r}; pip install 'mrope[{extra}]'\n"


def test_explain_needs_no_transformers() -> None:
    done = _without("transformers", "explain", "--family", "qwen3_vl", "text:1")
    assert done.returncode == 0, done.stderr
    assert "delta 0" in done.stdout


def test_bench_stage_measures_the_batches_of_a_config(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "stage.json"
    shape = "data={source: synthetic, rows: 16, shape: {width: 64, images: 1, image: [4, 4]}}"
    words = ("bench", "stage", DEMO, shape, "--repeats", "1", "--json", str(file))
    assert command(*words) == 0
    case = json.loads(file.read_text(encoding="utf-8"))["cases"]["demo"]
    assert case["tokens"] % 64 == 0
    assert list(case["seconds"]) == ["positions", "vision tensors", "flattened"]
    for seconds in case["seconds"].values():
        assert seconds.keys() == {"warm", "in a worker"}
        assert all(one > 0 for one in seconds.values())
    assert [row[1] for row in command.rows() if row[1]] == list(case["seconds"])
