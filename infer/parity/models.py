"""The two sides of the comparison: one released folder, read by our code and by the references.

The references are diffusers and transformers, which only the parity command needs. Random weights
are written as a released folder too, so that every comparison starts from files.
"""

import importlib
import importlib.util
import io
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import sentencepiece
import torch
from torch import Tensor, nn

from configs.parity import ParityConfig
from wan.errors import WanError
from wan.files import read_json, write_json
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.tokenizer_export import write_tokenizer_folder
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import (
    PipelineConfig,
    SamplingDefaults,
    part_folder,
    read_pipeline_config,
)
from wan.pipeline.folder import load_part
from wan.pipeline.parts import vae_levels, weight_kind
from wan.pipeline.pipeline import WanPipeline
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.hub import SHIPPED, resolve_model
from wan.weights.keys import VAELevels
from wan.weights.save import save_component

M = TypeVar("M", bound=nn.Module)

NEEDED = ("diffusers", "transformers", "accelerate")  # diffusers loads Wan with accelerate only
REFERENCE_CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
}


def reference(library: str) -> Any:
    """A reference library, quiet.

    Raises:
        WanError: it is not installed.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise WanError(
            f"parity compares with {' and '.join(missing)}, not installed here: "
            "pip install -e .[parity]"
        )
    module = importlib.import_module(library)
    logging = importlib.import_module(f"{library}.utils").logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return module


@dataclass(frozen=True)
class Sides:
    """A released folder and how to run it.

    Attributes:
        name: its name in the table.
        folder: a release in the diffusers layout.
        parts: the sub-folders that are there.
        dtype: of the weights. In bfloat16 the references' float32 is the truth for both sides.
        steps: steps of the sampling runs.
        seed: seed of the random inputs.
    """

    name: str
    folder: Path
    parts: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    steps: int = 6
    seed: int = 0

    @property
    def config(self) -> PipelineConfig:
        return read_pipeline_config(self.folder)

    @property
    def vae_levels(self) -> VAELevels:
        config = VAEConfig.from_json(read_json(part_folder(self.folder, "vae") / "config.json"))
        return vae_levels(config)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def ours(self, part: str, check_finite: bool = True) -> Any:
        """One of our networks, loaded by our code."""
        module = load_part(self.folder, part, dtype=self.dtype, check_finite=check_finite)
        return module.requires_grad_(False)

    def theirs(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """The reference's network, loaded by the reference, in `dtype` or that of this run."""
        library, class_name = REFERENCE_CLASSES[weight_kind(part)]
        model_class = getattr(reference(library), class_name)
        module = model_class.from_pretrained(
            part_folder(self.folder, part), torch_dtype=self.dtype if dtype is None else dtype
        )
        return module.eval().requires_grad_(False)

    def their_tokenizer(self) -> Any:
        # AutoTokenizer takes tokenizer.json as it is; T5's own class rebuilds it in transformers 5.
        return reference("transformers").AutoTokenizer.from_pretrained(
            part_folder(self.folder, "tokenizer")
        )

    def their_pipeline(self, folder: Path | None = None, dtype: torch.dtype | None = None) -> Any:
        """The reference's whole pipeline, from this folder or another."""
        source = self.folder if folder is None else folder
        shared = {  # the reference would look for them in the folder itself
            part: self.theirs(part, dtype)
            for part in ("vae", "text_encoder")
            if part_folder(source, part) != source / part
        }
        pipeline = reference("diffusers").WanPipeline.from_pretrained(
            source,
            torch_dtype=self.dtype if dtype is None else dtype,
            tokenizer=self.their_tokenizer(),
            **shared,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


# --- random weights -------------------------------------------------------------------------------

TEXT = UMT5Config(vocab_size=160, d_model=48, d_kv=12, d_ff=96, num_layers=3, num_heads=4)
WORDS = (
    *("a", "one", "the", "two", "small", "large", "red", "green", "blue", "yellow", "circle"),
    *("square", "star", "cat", "moving", "left", "right", "up", "down", "on", "gray", "black"),
    *("white", "background", "and", "with", "slowly", "still", "street", "sea"),
)
NUM_SENTINELS = 12


def random_sides(folder: Path, settings: dict[str, Any]) -> list[Sides]:
    """Two small models, written by our code: the geometry of TI2V-5B and that of T2V-A14B.

    Args:
        settings: of the `Sides`.
    """
    tokenizer = folder / "tokenizer"
    write_tokenizer_folder(train_spiece(), tokenizer, NUM_SENTINELS)
    per_frame = write_release(folder / "ti2v", tokenizer, small_vae("2.2"), two_experts=False)
    experts = write_release(folder / "a14b", tokenizer, small_vae("2.1"), two_experts=True)
    return [
        Sides("random TI2V", folder / "ti2v", per_frame, **settings),
        Sides("random A14B", folder / "a14b", experts, **settings),
    ]


def full_block_sides(folder: Path, settings: dict[str, Any]) -> list[Sides]:
    """One block of TI2V-5B at its full width, with embedders and head; no other networks."""
    return [replace(random_part(folder, DiTConfig(num_layers=1)), name="5B block", **settings)]


def random_part(folder: Path, config: DiTConfig | VAEConfig, seed: int = 0) -> Sides:
    """Write a release that is one network with random weights, a transformer or a vae."""
    if isinstance(config, VAEConfig):
        part, module = "vae", cast(nn.Module, WanVAE(config))
    else:
        part, module = "transformer", WanDiT(config)
    randomise(module, torch.Generator().manual_seed(seed))
    write_part(module.state_dict(), config, folder / part, part)
    return Sides(part, folder, (part,))


def write_part(
    state: dict[str, Tensor], config: Any, folder: Path, part: str, **options: Any
) -> None:
    """Write the weights and the config.json of one network into a folder, in the diffusers layout.

    Args:
        config: of the network: a DiTConfig, VAEConfig or UMT5Config.
        options: of `save_component`.
    """
    if part == "vae":
        options["vae_levels"] = vae_levels(config)
    save_component(state, folder, part, **options)
    write_json(folder / "config.json", config.to_json())


def small_vae(generation: str) -> VAEConfig:
    """A narrow autoencoder of a generation, with latent statistics that are not 0 and 1."""
    channels = 8
    mean = tuple(0.1 * i - 0.3 for i in range(channels))
    std = tuple(0.6 + 0.1 * i for i in range(channels))
    if generation == "2.2":
        return VAEConfig(
            base_dim=8, decoder_base_dim=12, z_dim=channels, latents_mean=mean, latents_std=std
        )
    return VAEConfig(
        base_dim=8,
        decoder_base_dim=None,
        z_dim=channels,
        is_residual=False,
        in_channels=3,
        out_channels=3,
        patch_size=None,
        latents_mean=mean,
        latents_std=std,
    )


def write_release(
    folder: Path, tokenizer_folder: Path, vae: VAEConfig, two_experts: bool
) -> tuple[str, ...]:
    """Write a released folder with random weights; the names of its networks."""
    transformer = DiTConfig(
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=3,
        ffn_dim=256,
        in_channels=vae.z_dim,
        out_channels=vae.z_dim,
        text_dim=TEXT.d_model,
    )
    config = PipelineConfig(
        "WanPipeline",
        transformer,
        vae,
        TEXT,
        boundary_ratio=0.875 if two_experts else None,
        expand_timesteps=not two_experts,
        scheduler=SchedulerSettings(shift=12.0 if two_experts else 5.0),
        defaults=SamplingDefaults(max_sequence_length=128),
    )
    generator = torch.Generator().manual_seed(0)
    pipeline = WanPipeline(
        config=config,
        tokenizer=Tokenizer.from_folder(tokenizer_folder),
        text_encoder=randomise(UMT5Encoder(TEXT), generator),
        transformer=randomise(WanDiT(transformer), generator),
        transformer_2=randomise(WanDiT(transformer), generator) if two_experts else None,
        vae=randomise(WanVAE(vae), generator),
    )
    pipeline.save_pretrained(folder)
    return config.components


def drawn_like(name: str, tensor: Tensor, kind: str, text: UMT5Config) -> tuple[float, float]:
    """Mean and spread of random weights with which every path of a network matters.

    Nothing is zero, nothing is one, and outputs are of order one.

    Args:
        name: ours, of a parameter.
        kind: "transformer", "vae" or "text_encoder".
        text: the settings of the text encoder, whose scores are not scaled.
    """
    if name.endswith(("norm.weight", "gamma")):
        return 1.0, 0.2
    if tensor.ndim == 1:
        return 0.0, 0.1
    if name.endswith("modulation"):
        return 0.0, 0.3
    fan_in = tensor[0].numel()
    if kind == "text_encoder" and name.endswith("query.weight"):
        fan_in *= text.d_kv
    return 0.0, fan_in**-0.5


@torch.no_grad()
def randomise(module: M, generator: torch.Generator) -> M:
    """Fill a network with random weights; see `drawn_like`."""
    text, kind = UMT5Config(), "transformer"
    if isinstance(module, UMT5Encoder):
        text, kind = module.config, "text_encoder"
    for name, parameter in module.named_parameters():
        mean, std = drawn_like(name, parameter, kind, text)
        parameter.normal_(mean=mean, std=std, generator=generator)
    return module


def train_spiece() -> bytes:
    """A small SentencePiece model in the layout of the released one."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=9)) for _ in range(400)]
    sentences += ["The quick brown fox, jumps: over (13) lazy dogs! café 天地"] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=TEXT.vocab_size - NUM_SENTINELS,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@contextmanager
def releases(config: ParityConfig) -> Iterator[list[Sides]]:
    """What to compare; random weights live as long as the context.

    Raises:
        WanError: no such release.
    """
    dtype = getattr(torch, config.dtype)
    settings: dict[str, Any] = {"dtype": dtype, "steps": config.steps, "seed": config.seed}
    if config.checkpoint == "random":
        make = full_block_sides if config.full_block else random_sides
        with tempfile.TemporaryDirectory() as scratch:
            yield make(Path(scratch), settings)
        return
    name = SHIPPED.get(config.checkpoint, config.checkpoint)
    folder = resolve_model(name, config.revision)
    parts = read_pipeline_config(folder).components
    yield [Sides(Path(config.checkpoint).name, folder, parts, **settings)]
