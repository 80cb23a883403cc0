"""The kernels, and what is known of them without importing a compiler."""
