"""Write the goldens of the installed transformers, or check that they still stand.

    PYTHONPATH=src:tests python tests/parity/make_goldens.py [--check]

Run it through `make parity`, in an environment that holds the release in question.
"""

from __future__ import annotations

import json
import sys

import transformers

from mrope.hf.get_rope_index import has_rope_index, installed_reference, reference_rope_index
from parity.goldens import digest, golden_batches, golden_file
from support.batches import RELEASED_ROWS


def main() -> int:
    """Return 0 where the file was written, or is what this release computes."""
    reference = installed_reference()
    families = {}
    for family, name in RELEASED_ROWS:
        if name != reference or not has_rope_index(family):
            continue
        pairs = [
            [digest(batch), digest(reference_rope_index(spec, batch))]
            for spec, batch in golden_batches(family, reference)
        ]
        families[family] = {"inputs": [p[0] for p in pairs], "outputs": [p[1] for p in pairs]}
    golden = {"transformers": transformers.__version__, "families": families}
    text = json.dumps(golden, indent=0) + "\n"
    file = golden_file(transformers.__version__)
    if "--check" not in sys.argv[1:]:
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
        return 0
    same = file.read_text(encoding="utf-8") == text
    print(f"{file}: {'as' if same else 'NOT as'} transformers {transformers.__version__} computes")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
