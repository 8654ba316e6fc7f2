"""The model's own processor: what is said where it cannot be loaded, or is another model's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mrope import MRopeError, load_config
from mrope.training.dataloader import load_rows
from mrope.training.demo.tokenizer import build_tokenizer
from mrope.training.processor import load_processor

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def save_qwen(folder: Path) -> Path:
    """Write the files of a Qwen3-VL processor, as a model's folder has them."""
    build_tokenizer().save_pretrained(folder)
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    clips = {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(images | clips))
    return folder


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="it is torchvision that is missing"
)
def test_a_missing_or_broken_torchvision_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_qwen(tmp_path / "model")
    with pytest.raises(MRopeError) as caught:
        load_processor(str(folder))
    assert "needs torchvision, which is not installed: pip install torchvision (its r" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    broken = tmp_path / "site" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise RuntimeError('operator nms does not exist\\nat all')"
    )
    monkeypatch.syspath_prepend(str(broken.parent))
    with pytest.raises(MRopeError) as caught:
        load_processor(str(folder))
    assert "cannot be imported (operator nms does not exist): install its release" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_tokenizer_alone(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(MRopeError, match="(?s)torchvision|it holds a tokenizer alone"):
        load_processor(str(tmp_path))


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hello."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    changes = [f"data.source={tmp_path / 'rows.jsonl'}", "data.rows=null"]
    for change, words in (
        ("model.config.image_token_id=7", "has <.image_pad.> as 5, but the model's config says 7"),
        ("model.config.text_config.vocab_size=500", "has 512 entries, but vocab_size is 500"),
    ):
        with pytest.raises(MRopeError, match=f"no processor is given .*{words}"):
            load_rows(load_config(DEMO, [*changes, change]))


def test_families_that_the_demo_cannot_prepare(tmp_path: Path) -> None:
    from mrope.training.demo.processor import demo_processor

    with pytest.raises(MRopeError, match="the demo has no processor for glm4v: set data.processor"):
        demo_processor("glm4v", {})


def test_the_processor_is_not_sent_to_workers(tmp_path: Path) -> None:
    rows: Any = load_rows(load_config(DEMO, ["data.rows=1"]))
    assert rows.conversations.processor is rows.conversations.processor
    assert rows.conversations.__getstate__()["_loaded"] is None
