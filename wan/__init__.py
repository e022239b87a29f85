"""Wan2.2 few-step video diffusion: the models and their maths.

from wan import WanDMDPipeline, WanPipeline
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.errors import WanError
    from wan.pipeline import WanDMDPipeline, WanPipeline
    from wan.pipeline_io import WanPipelineOutput

__all__ = ["WanDMDPipeline", "WanError", "WanPipeline", "WanPipelineOutput"]


def __getattr__(name: str) -> Any:
    """Import the pipelines when they are asked for: `wan.errors` alone must not load PyTorch."""
    if name == "WanError":
        from wan.errors import WanError

        return WanError
    if name in __all__:
        from wan import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'wan' has no attribute {name!r}")
