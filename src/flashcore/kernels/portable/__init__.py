"""Triton kernels that run on sm_80 to sm_120 and, interpreted, on any CPU."""
