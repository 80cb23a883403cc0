"""Where a kernel's time goes: Nsight Compute's counters where there are any, and its place under the roofline always.

`ncu` runs `target` as a child and hands what it printed to `ncu_page`; `roofline` takes times, from `flashcore bench` or
from the profiler, and places them under ceilings that were measured, or, on paper, under a datasheet's.
"""
