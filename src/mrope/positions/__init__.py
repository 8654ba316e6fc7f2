"""M-RoPE position ids and rope deltas, in vectorised numpy."""
