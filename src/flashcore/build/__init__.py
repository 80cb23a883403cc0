"""Turning kernels into binaries without a GPU: the compile path, the shipped set, the facts read off machine code."""
