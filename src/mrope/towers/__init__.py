"""Tensors that a vision or audio tower would derive from sizes, computed in the worker."""
