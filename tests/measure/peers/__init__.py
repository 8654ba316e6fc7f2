"""The training step of what a user would pick instead, on the same batches, with the same weights.

    PYTHONPATH=src:tests python -m measure.peers.run [CASE,CASE] [PEER,PEER]

`run` starts a process for each peer, in an environment of its own, and `table` prints what they measured.

| module | peers |
|---|---|
| `ours` | transformers under sdpa, under its flash path, with compiled text layers; attached; attached with fixed shapes; one graph; both with Liger |
| `veomni_step` | VeOmni's own Qwen3-VL, by its own builder and collator, with its defaults: Liger's loss, norms and rope |
| `lmms_step` | transformers' Qwen3-VL under lmms-engine's patches: padding removed, Liger's loss, norms, rope and SwiGLU |

What is the same: rows and pixels (`rows`), weights by name and the way to measure (`cell`), FLOPs (`flops`),
and FlashAttention 2, which is torch's own copy of its kernels (`kernels`), since no wheel of it was to be had.
What is left out, for all: optimizer, copies to the device, FSDP, activation checkpointing.
"""
