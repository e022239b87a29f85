"""Wan2.2 few-step video diffusion, from scratch in PyTorch.

The public names stand in `__all__`; everything else is imported from the room that holds it
(`wan.models`, `wan.sampling`, `wan.weights`, `wan.lora`, `wan.media`, `wan.runtime`,
`wan.pipeline`). `wan/README.md` shows how they fit together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.errors import WanError
    from wan.media.scripts import export_to_video, load_image
    from wan.pipeline.inputs import WanPipelineOutput
    from wan.pipeline.parts import AutoencoderKLWan, UMT5EncoderModel, WanTransformer3DModel
    from wan.pipeline.pipeline import (
        DiffusionPipeline,
        WanDMDPipeline,
        WanImageToVideoPipeline,
        WanPipeline,
    )
    from wan.pipeline.schedulers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )
    from wan.pipeline.tokenizer_files import AutoTokenizer

__version__ = "0.9.0"

# public name -> the module that defines it
_HOME = {
    "AutoTokenizer": "wan.pipeline.tokenizer_files",
    "AutoencoderKLWan": "wan.pipeline.parts",
    "DPMSolverMultistepScheduler": "wan.pipeline.schedulers",
    "DiffusionPipeline": "wan.pipeline.pipeline",
    "FlowMatchEulerDiscreteScheduler": "wan.pipeline.schedulers",
    "UMT5EncoderModel": "wan.pipeline.parts",
    "UniPCMultistepScheduler": "wan.pipeline.schedulers",
    "WanDMDPipeline": "wan.pipeline.pipeline",
    "WanError": "wan.errors",
    "WanImageToVideoPipeline": "wan.pipeline.pipeline",
    "WanPipeline": "wan.pipeline.pipeline",
    "WanPipelineOutput": "wan.pipeline.inputs",
    "WanTransformer3DModel": "wan.pipeline.parts",
    "export_to_video": "wan.media.scripts",
    "load_image": "wan.media.scripts",
}

__all__ = [
    "AutoTokenizer",
    "AutoencoderKLWan",
    "DPMSolverMultistepScheduler",
    "DiffusionPipeline",
    "FlowMatchEulerDiscreteScheduler",
    "UMT5EncoderModel",
    "UniPCMultistepScheduler",
    "WanDMDPipeline",
    "WanError",
    "WanImageToVideoPipeline",
    "WanPipeline",
    "WanPipelineOutput",
    "WanTransformer3DModel",
    "__version__",
    "export_to_video",
    "load_image",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `import wan.errors` must not load PyTorch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'wan' has no attribute {name!r}; public are {', '.join(__all__)}")
