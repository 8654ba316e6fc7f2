"""Run `mrope train` on this rank with each config, under DDP and under accelerate's FSDP2.

On CPU ranks accelerate itself would choose DDP where FSDP is asked for.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from mrope.cli import main

_own_init: Any = AcceleratorState.__init__


def _init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _own_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    # Set anew by every further state, which shares all attributes with the first.
    if getattr(self, "fsdp_plugin", None) is not None:
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _init
    for file in sys.argv[1:]:
        sys.argv[1:] = ["train", file]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
        AcceleratorState._reset_state(reset_partial_state=True)
