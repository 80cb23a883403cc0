"""Gluon kernels for sm_90a."""
