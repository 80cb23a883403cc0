"""Search for the configurations of the forward kernels: sampled, built and gated without a GPU, judged and timed on one."""
