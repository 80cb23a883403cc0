"""FlashCore: fused attention kernels for NVIDIA GPUs, written in Python, compiled ahead of time, verified against fp64."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module; imported on first use, so that `import flashcore` costs nothing and touches no GPU
_EXPORTS = {
    "attention": "flashcore.api",
    "scaled_dot_product_attention": "flashcore.api",
    "explain": "flashcore.api",
    "explain_sdpa": "flashcore.api",
    "merge_states": "flashcore.merge",
    "Plan": "flashcore.plan",
    "FlashCoreError": "flashcore.errors",
}

__all__ = [*_EXPORTS, "__version__", "reference"]

if TYPE_CHECKING:
    from flashcore import reference
    from flashcore.api import attention, explain, explain_sdpa, scaled_dot_product_attention
    from flashcore.errors import FlashCoreError
    from flashcore.merge import merge_states
    from flashcore.plan import Plan


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("flashcore.reference")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'flashcore' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
