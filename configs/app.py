"""The settings of `python -m infer.app`, the local page for experiments."""

from dataclasses import dataclass

from configs.schema import DTYPES, Options, check_device, option


@dataclass
class AppConfig(Options):
    """`infer.app`: where the page is served, where videos go, and what all runs share."""

    output_dir: str = option("outputs", "videos and records; the only folder that is served")
    host: str = option(
        "127.0.0.1",
        "address to listen at; 0.0.0.0 lets other machines in, and nobody has to log in",
    )
    port: int = option(7860, "port to listen at", at_least=1, at_most=65535)
    device: str = option("auto", "as for infer.sample", check=check_device)
    dtype: str = option("auto", "as for infer.sample", choices=("auto", *DTYPES))
    offload: str = option("none", "as for infer.sample", choices=("none", "stage", "block"))
    quantize: str = option("none", "as for infer.sample", choices=("none", "int8", "fp8"))
