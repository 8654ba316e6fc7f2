"""Options of the trainers' tests, and an import of torchvision that works without CUDA."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch


def _import_torchvision() -> None:
    """Import torchvision, in the environment of lmms-engine the only package that needs it.

    Its compiled operators load only beside a CUDA build of torch. Its import then fails where it
    describes two of them; these are declared here, without an implementation, since nothing that
    is tested calls them. Must run before transformers is imported, which imports torchvision.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", arguments)
        importlib.import_module("torchvision")


_import_torchvision()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test is skipped")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With `--no-skips`, fail: a trainer that cannot be imported only skips its tests."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter is not None and reporter.stats.get("skipped")
    if skipped and session.config.getoption("--no-skips"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
