"""Networks that turn frames and texts into directions: CLIP's two towers, or one of images alone.

They are loaded with transformers from safetensors files, and see what their own preprocessor makes
of a frame. All embeddings have length 1, so that a product of two is the cosine of their angle.

F frames, H W pixels, P prompts, D channels of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan.errors import WanError
from wan.files import read_json
from wan.weights.digests import remembered_sha256
from wan.weights.hub import hub_id, resolve_model
from wan.weights.safetensors_file import read_header

PATTERNS = ("*.safetensors", "*.json", "*.txt")
FRAMES_AT_ONCE = 16


def transformers() -> Any:
    """The library, quiet.

    Raises:
        WanError: it is not installed.
    """
    try:
        import transformers as library
    except ImportError as error:
        raise WanError(
            'text and consistency need transformers: pip install -e ".[metrics]"; '
            "measures=[motion] needs no network"
        ) from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@dataclass(frozen=True)
class TowerFolder:
    """Where a network lies.

    Attributes:
        given: what it was named by.
        path: its folder, or the hub's snapshot of it.
        kind: the model type that its config.json names.
    """

    given: str
    path: Path
    kind: str

    @classmethod
    def find(cls, option: str, given: str) -> "TowerFolder":
        """The folder of a network, fetched from the hub if it is not in its cache.

        Args:
            option: the setting that names it, for errors.
            given: a folder, `owner/name`, or `owner/name@revision`.
        Raises:
            WanError: it is not there and can't be fetched, is damaged, or has no safetensors.
        """
        name, _, revision = given.partition("@")
        if Path(given).exists() or not revision:
            name, revision = given, ""
        try:
            path = resolve_model(name, revision or None, patterns=PATTERNS)
        except WanError as error:
            raise WanError(f"{option}={error}") from error
        config = path / "config.json"
        if not config.is_file():
            raise WanError(
                f"{option}={given}: no config.json in {path}; give the folder of a model"
            )
        kind = str(read_json(config).get("model_type"))
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise WanError(
                f"{option}={given}: no .safetensors file in {path}; other formats are not read, as "
                "they can run code. Choose a model that has one, such as "
                "openai/clip-vit-large-patch14 or facebook/dinov2-base"
            )
        for file in files:
            read_header(file)
        return cls(given, path, kind)

    def identity(self) -> dict[str, str]:
        """What a report says of a network, and what its numbers depend on."""
        names = [*self.path.glob("*.safetensors"), *self.path.glob("*.json")]
        digests = remembered_sha256(sorted(names))
        found = {"given": self.given, "kind": self.kind}
        if (name := hub_id(self.path)) is not None:
            found |= {"hub_id": name, "commit": self.path.name}
        return found | {path.name: digest for path, digest in sorted(digests.items())}


def load_network(folder: TowerFolder, option: str, device: torch.device, **options: Any) -> Any:
    """The network in evaluation mode, float32.

    Raises:
        WanError: its files do not fit together, or lack weights that are needed.
    """
    library = transformers()
    try:
        network, info = library.AutoModel.from_pretrained(
            folder.path,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever the library raises of files that it can't read
        raise WanError(f"{option}={folder.given}: {_first_line(error)}") from error
    missing = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if missing := sorted(name for name in missing if not name.startswith("pooler.")):
        raise WanError(
            f"{option}={folder.given}: its weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; numbers of random weights would mean nothing"
        )
    return network.eval().to(device)


def load_helper(folder: TowerFolder, option: str, kind: str, **options: Any) -> Any:
    """The tokenizer or the image processor of a network, by the name of its class."""
    try:
        auto = getattr(transformers(), kind)
        return auto.from_pretrained(folder.path, local_files_only=True, **options)
    except Exception as error:
        raise WanError(f"{option}={folder.given}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"


class ImageTower:
    """A network that embeds frames: CLIP's image tower, DINO, DINOv2, DINOv3 or another ViT.

    The embedding is CLIP's projection, of other networks the last state of the class token.
    """

    def __init__(self, folder: TowerFolder, option: str, device: torch.device) -> None:
        self.folder, self.option, self.device = folder, option, device
        more = {"add_pooling_layer": False} if folder.kind == "vit" else {}
        self.network = load_network(folder, option, device, **more)
        # With Pillow: torchvision, where it is installed, resizes to slightly other numbers.
        self.processor = load_helper(folder, option, "AutoImageProcessor", backend="pil")

    @torch.inference_mode()
    def frames(self, frames: NDArray[np.uint8]) -> Tensor:
        """(F, H, W, 3) RGB -> (F, D) float32 on the CPU, of length 1."""
        found = []
        for start in range(0, len(frames), FRAMES_AT_ONCE):
            part = list(frames[start : start + FRAMES_AT_ONCE])
            pixels = self.processor(images=part, return_tensors="pt")["pixel_values"]
            found.append(self._embed(pixels.to(self.device)))
        return unit_length(torch.cat(found), f"{self.option}={self.folder.given}")

    def _embed(self, pixels: Tensor) -> Tensor:
        if self.folder.kind == "clip":
            return embedding(self.network.get_image_features(pixel_values=pixels))
        state = getattr(self.network(pixel_values=pixels), "last_hidden_state", None)
        if state is None or state.ndim != 3:
            raise WanError(
                f"{self.option}={self.folder.given}: a {self.folder.kind} has no class token; "
                "choose CLIP, DINO, DINOv2 or DINOv3"
            )
        return state[:, 0]


class CLIP(ImageTower):
    """Both towers of a CLIP model (arXiv:2103.00020)."""

    def __init__(self, folder: TowerFolder, device: torch.device) -> None:
        if folder.kind != "clip":
            raise WanError(
                f"clip_model={folder.given}: a {folder.kind}, and agreement with a text needs a "
                "CLIP model; as image_tower= it can judge consistency"
            )
        super().__init__(folder, "clip_model", device)
        self.tokenizer = load_helper(folder, "clip_model", "AutoTokenizer")
        self.num_tokens = int(self.network.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """(P, D) float32 on the CPU, of length 1; and which prompts are longer than is read."""
        found, is_cut = [], []
        for prompt in prompts:  # one by one: no padding, whatever the tokenizer's token for it is
            is_cut.append(len(self.tokenizer(prompt)["input_ids"]) > self.num_tokens)
            tokens = self.tokenizer(
                prompt, truncation=True, max_length=self.num_tokens, return_tensors="pt"
            )
            ids = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            found.append(embedding(self.network.get_text_features(**ids)))
        return unit_length(torch.cat(found), f"clip_model={self.folder.given}"), is_cut


def embedding(features: Any) -> Tensor:
    """The projected embedding in what a tower returns."""
    return features if isinstance(features, Tensor) else features.pooler_output


def unit_length(vectors: Tensor, of: str) -> Tensor:
    """Vectors (N, D) divided by their length.

    Raises:
        WanError: one is not finite.
    """
    vectors = vectors.float().cpu()
    if not vectors.isfinite().all():
        raise WanError(f"{of}: its embeddings are not finite; its weights are damaged")
    return torch.nn.functional.normalize(vectors, dim=-1)
