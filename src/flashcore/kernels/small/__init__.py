"""The forward kernel for small problems on Hopper GPUs (sm_90a), in Gluon: a cluster of blocks shares a tile's keys."""
