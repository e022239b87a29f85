"""Wan2.2 few-step video diffusion, from scratch in PyTorch.

The public names stand in `__all__`; everything else is imported from the room that holds it
(`wan.models`, `wan.sampling`, `wan.weights`, `wan.lora`, `wan.media`, `wan.runtime`,
`wan.pipeline`). `wan/README.md` shows how they fit together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.errors import WanError
    from wan.pipeline.inputs import WanPipelineOutput
    from wan.pipeline.pipeline import WanDMDPipeline, WanPipeline

__all__ = ["WanDMDPipeline", "WanError", "WanPipeline", "WanPipelineOutput", "__version__"]

__version__ = "0.2.0"

# public name -> the module that defines it
_HOME = {
    "WanDMDPipeline": "wan.pipeline.pipeline",
    "WanError": "wan.errors",
    "WanPipeline": "wan.pipeline.pipeline",
    "WanPipelineOutput": "wan.pipeline.inputs",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `import wan.errors` must not load PyTorch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'wan' has no attribute {name!r}; public are {', '.join(__all__)}")
