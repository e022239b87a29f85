"""The DiT as a sampler sees it: (x, timestep) -> velocity, for one batch of prompts.

Guidance, the hand-over between two experts and a clean first frame live here, so that samplers know
a plain function and the DiT knows a plain forward. B batch, C channels, T H W latent sizes.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wan.errors import WanError


class Network(Protocol):
    """What is needed of a DiT (`wan.models.dit.WanDiT`)."""

    def __call__(
        self, latents: Tensor, timestep: Tensor, context: Any, *, exact: bool
    ) -> Tensor: ...

    def prepare_context(self, context: Tensor, num_tokens: int | None = None) -> Any: ...


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_u + g (v_c - v_u). Source: arXiv:2207.12598, eq. 6, as v."""
    return unconditional + scale * (conditional - unconditional)


def num_text_rows(context: Tensor) -> int:
    """How many rows of one text (1, S, text_dim) to tell apart; all later ones are zero.

    With the two rows that stand for the later ones (`wan.models.dit.share_padding`) they are a
    multiple of
    8: a size that kernels like, and few different ones to compile.
    """
    num_rows = context.shape[1]
    filled = context.any(dim=-1)[0].nonzero()  # (n, 1)
    used = int(filled[-1]) + 1 if len(filled) else 0
    return min(-(-(used + 2) // 8) * 8 - 2, num_rows)


@dataclass(frozen=True)
class Expert:
    """A network and the guidance it is sampled with; 1 is none, and costs one forward, not two."""

    network: Network
    guidance_scale: float = 1.0


class Denoiser:
    """velocity(x, timestep) for a batch, computed one sample at a time.

    Samples go through the network one by one: matrix products of another batch size round
    differently, and a video must not depend on what it shares a batch with. At video sizes one
    sample fills a GPU anyway.

    Args:
        high_noise: the only expert, or the one for timesteps from the boundary up.
        context: (B, S, text_dim), the encoded prompts. Rows that are zero to the end are attended
            as one that counts for all: the same function (up to rounding) in less time.
        negative_context: like `context`, for the second forward of guidance; may be None if no
            expert uses guidance.
        low_noise: the expert for timesteps below the boundary.
        boundary: hand-over as a noise level in (0, 1); given with `low_noise` and only then.
        image_latents: (B, C, 1, H, W), normalised: frame 0 is this, clean, at timestep 0 (TI2V).
        before_expert: called with an expert's network before its first forward and at each
            hand-over; a place to bring weights to the device.
        exact_timesteps: where the networks attend exactly whatever their own attention.

    Raises:
        WanError: pieces that do not fit together.
    """

    def __init__(
        self,
        high_noise: Expert,
        context: Tensor,
        negative_context: Tensor | None = None,
        low_noise: Expert | None = None,
        boundary: float | None = None,
        image_latents: Tensor | None = None,
        before_expert: Callable[[Network], None] | None = None,
        exact_timesteps: Collection[float] = (),
    ) -> None:
        if (low_noise is None) != (boundary is None):
            raise WanError(
                f"boundary={boundary} with {'one expert' if low_noise is None else 'two experts'}: "
                "two experts need the noise level where they hand over, one has none"
            )
        if boundary is not None and not 0 < boundary < 1:
            raise WanError(f"boundary={boundary}: must lie between 0 and 1")
        for expert in (high_noise, low_noise):
            if expert is None:
                continue
            if not math.isfinite(expert.guidance_scale):
                raise WanError(f"guidance_scale={expert.guidance_scale}: must be a finite number")
            if expert.guidance_scale != 1 and negative_context is None:
                raise WanError(
                    f"guidance_scale={expert.guidance_scale} needs a negative context (that of the "
                    "empty prompt will do)"
                )
        if negative_context is not None and len(negative_context) != len(context):
            raise WanError(f"{len(negative_context)} negative contexts for {len(context)} prompts")
        self.high_noise = high_noise
        self.low_noise = low_noise
        self.boundary = boundary
        self.context = context
        self.negative_context = negative_context
        self.image_latents = image_latents
        self.exact_timesteps = exact_timesteps
        self._before_expert = before_expert
        self._active: Expert | None = None
        self._prepared: dict[tuple[int, bool], Any] = {}  # by sample, and whether negative

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: float) -> Tensor:
        """Guided velocity: (B, C, T, H, W) float32 at 1000 sigma = timestep -> the same shape.

        Where frame 0 is given, the network sees it clean whatever x holds there.
        """
        if len(x) != len(self.context):
            raise WanError(f"{len(x)} latents for {len(self.context)} prompts")
        expert = self.expert_at(timestep)
        if expert is not self._active:
            self._switch_to(expert)
        x = self.impose_image(x)
        return torch.cat(
            [self._guided(expert, one, timestep, j) for j, one in enumerate(x.split(1))]
        )

    def expert_at(self, timestep: float) -> Expert:
        """Which expert runs at a timestep; the boundary itself belongs to `high_noise`."""
        if self.low_noise is None or self.boundary is None or timestep >= self.boundary * 1000:
            return self.high_noise
        return self.low_noise

    def impose_image(self, x: Tensor) -> Tensor:
        """Put the given first frame in place of the one in x; x itself if none was given.

        For use after the last step too, since a sampler moves frame 0 with the others.
        """
        if self.image_latents is None:
            return x
        return torch.cat([self.image_latents.to(x), x[:, :, 1:]], dim=2)

    def set_context(self, context: Tensor, negative_context: Tensor | None) -> None:
        """Go on with other prompts from the next step on."""
        self.context, self.negative_context = context, negative_context
        self._prepared.clear()

    def _switch_to(self, expert: Expert) -> None:
        # Keys and values of the text belong to the network that made them.
        self._prepared.clear()
        if self._before_expert is not None:
            self._before_expert(expert.network)
        self._active = expert

    def _guided(self, expert: Expert, x: Tensor, timestep: float, sample: int) -> Tensor:
        """v_u + g (v_c - v_u) in float32, of one sample (1, C, T, H, W)."""
        conditional = self._forward(expert, x, timestep, sample, negative=False)
        if expert.guidance_scale == 1:
            return conditional
        unconditional = self._forward(expert, x, timestep, sample, negative=True)
        return guide(conditional, unconditional, expert.guidance_scale)

    def _forward(
        self, expert: Expert, x: Tensor, timestep: float, sample: int, negative: bool
    ) -> Tensor:
        """One forward of the network, float32; the text's part is prepared once and kept."""
        key = (sample, negative)
        if key not in self._prepared:
            context = self.negative_context if negative else self.context
            assert context is not None
            one = context[sample : sample + 1]
            self._prepared[key] = expert.network.prepare_context(one, num_text_rows(one))
        timesteps, exact = self._timesteps(x, timestep), timestep in self.exact_timesteps
        return expert.network(x, timesteps, self._prepared[key], exact=exact).float()

    def _timesteps(self, x: Tensor, timestep: float) -> Tensor:
        """(1,) float32, or (1, T) with 0 for a given first frame."""
        if self.image_latents is None:
            return torch.tensor([timestep], dtype=torch.float32, device=x.device)
        per_frame = torch.full((1, x.shape[2]), timestep, dtype=torch.float32, device=x.device)
        per_frame[:, 0] = 0
        return per_frame
