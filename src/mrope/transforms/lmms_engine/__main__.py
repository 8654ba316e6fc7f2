"""Start lmms-engine's launcher with this package's datasets in its registry.

The arguments are those of `lmms_engine.launch.cli`.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    # Run as a script, not imported: hydra finds the launcher's default config beside the script's
    # file only, since lmms-engine 0.1.4 has no `__init__.py` in that folder.
    runpy.run_module("lmms_engine.launch.cli", run_name="__main__", alter_sys=True)
