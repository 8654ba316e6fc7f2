"""Generation from batches of the stage: the tokens that the plain batch gives."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", "5.24")
