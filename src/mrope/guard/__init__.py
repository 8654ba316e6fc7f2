"""Find what makes the host wait for a CUDA device, on a machine without one."""
