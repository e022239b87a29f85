"""The machine that a command runs on: versions, hardware, and whether its folder can be written."""

import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from wan.errors import WanError
from wan.files import expanded

PACKAGES = (
    *("wan-few-step", "torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "ftfy"),
    *("hydra-core", "omegaconf", "av", "pillow", "huggingface-hub"),
)
# Optional packages with kernels: recorded if they are installed.
KERNELS = ("triton", "flash-attn", "flash-attn-3", "sageattention")


def writable_folder(name: str) -> Path:
    """Create the output folder, and test with a file that it can be written to.

    Raises:
        WanError: it can't be written to; names the reason.
    """
    folder = expanded(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WanError(
            f"output_dir={name}: can't be written to ({error.strerror}); choose another folder"
        ) from error
    return folder


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a video was made with; nothing about the user."""
    kernels = {name: version for name in KERNELS if (version := package_version(name))}
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES} | kernels,
        "processor": processor(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
        record["cudnn"] = torch.backends.cudnn.version()
        record["driver"] = driver_version()
    return record


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's kernel module, such as 550.54.15; None if it is not known."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[0] if found else None


def processor() -> str:
    """The CPU's model name; its kind, such as x86_64, where the system gives no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None
