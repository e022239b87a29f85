"""The DiT as a sampler sees it: (x, timestep) -> velocity.

Conditions, classifier-free guidance and the switch between two experts live here, so that a sampler
sees a plain function and the DiT stays a plain forward pass. `Denoiser` is for sampling, one sample
at a time; training calls `guided_velocity` on whole batches.

B batch, S text tokens, C channels, T H W latent sizes.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from wan.errors import WanError


class Network(Protocol):
    """The interface that sampling needs of a DiT (`wan.models.dit.WanDiT`)."""

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Any,
        num_tokens: int | None = None,
        exact: bool = False,
    ) -> Tensor: ...

    def prepare_context(self, context: Tensor, num_tokens: int | None = None) -> Any: ...


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch: encoded captions and, if given, clean first frames (TI2V).

    Attributes:
        context: (B, S, text_dim), zero after each caption's tokens.
        num_tokens: all text tokens from this index on are zero; None if they were not counted.
        first_frame: (B, C, 1, H, W) normalised latents, or None.
    """

    context: Tensor
    num_tokens: int | None = None
    first_frame: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def select(self, samples: Tensor) -> "Condition":
        """Some samples of the batch, by a boolean or integer index."""
        frame = None if self.first_frame is None else self.first_frame[samples]
        return Condition(self.context[samples], self.num_tokens, frame)

    def joined(self, other: "Condition") -> "Condition":
        """Both batches as one; both must have first frames, or neither."""
        frames = [f for f in (self.first_frame, other.first_frame) if f is not None]
        counts = [n for n in (self.num_tokens, other.num_tokens) if n is not None]
        return Condition(
            torch.cat([self.context, other.context]),
            max(counts) if len(counts) == 2 else None,
            torch.cat(frames) if frames else None,
        )

    def impose(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) with the given first frame in place of its own, if there is one."""
        if self.first_frame is None:
            return x
        return torch.cat([self.first_frame.to(x), x[:, :, 1:]], dim=2)

    def timesteps(self, timestep: Tensor, num_frames: int) -> Tensor:
        """Timesteps (B,) for the network: unchanged, or (B, T) with 0 for a given first frame."""
        if self.first_frame is None:
            return timestep
        per_frame = timestep[:, None].repeat(1, num_frames)
        per_frame[:, 0] = 0
        return per_frame

    def frame_weight(self, num_frames: int) -> Tensor | None:
        """Weights (B, 1, T, 1, 1): 0 for a given first frame, 1 for the others; None without."""
        if self.first_frame is None:
            return None
        weight = torch.ones(len(self), 1, num_frames, 1, 1, device=self.context.device)
        weight[:, :, 0] = 0
        return weight


class Halves(Protocol):
    """Two groups of processes that compute guidance's two forwards. See `wan.runtime.parallel`."""

    negative: bool  # whether this process computes the unconditional velocity

    def exchange(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """This process's velocity -> the conditional and the unconditional one."""
        ...


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: v_u + g (v_c - v_u). Source: arXiv:2207.12598, eq. 6."""
    return unconditional + scale * (conditional - unconditional)


def predict_velocity(
    network: Callable[..., Tensor], x: Tensor, timestep: Tensor, condition: Condition
) -> Tensor:
    """The network's velocity at one timestep per sample, (B,): (B, C, T, H, W) float32.

    The network sees a given first frame clean, at timestep 0, whatever x holds there.
    """
    timesteps = condition.timesteps(timestep, x.shape[2])
    return network(condition.impose(x), timesteps, condition.context, condition.num_tokens)


def guided_velocity(
    network: Callable[..., Tensor],
    x: Tensor,
    timestep: Tensor,
    condition: Condition,
    null: Condition,
    scale: float | Tensor,
) -> Tensor:
    """The velocity under classifier-free guidance; both forwards run as one batch.

    Args:
        null: the same samples with the negative (mostly the empty) caption.
        scale: weight g in v_u + g (v_c - v_u), for all samples or (B, 1, 1, 1, 1) for each; with
            the number 1 a single forward pass is enough.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return predict_velocity(network, x, timestep, condition)
    both = condition.joined(null)
    doubled = predict_velocity(network, torch.cat([x, x]), torch.cat([timestep, timestep]), both)
    with_text, without = doubled.chunk(2)
    return guide(with_text, without, scale)


def num_text_tokens(context: Tensor) -> int:
    """Number of leading tokens to keep of one text (1, S, text_dim); all later ones are zero.

    With the two tokens that `wan.models.dit.share_padding` adds, it is a multiple of 8: kernels are
    fast at such sizes, and only few different sizes have to be compiled.
    """
    length = context.shape[1]
    filled = context.any(dim=-1)[0].nonzero()  # (n, 1)
    used = int(filled[-1]) + 1 if len(filled) else 0
    return min(-(-(used + 2) // 8) * 8 - 2, length)


@dataclass(frozen=True)
class Expert:
    """A network and its guidance scale; 1 turns guidance off and saves the second forward."""

    network: Network
    guidance_scale: float = 1.0


class Denoiser:
    """velocity(x, timestep) for a batch, computed one sample at a time.

    Samples go through the network one by one: matrix products of another batch size round
    differently, and a video must not depend on the others in its batch. At video sizes one sample
    keeps a GPU busy anyway.

    Args:
        high_noise: the only expert, or the one for timesteps from the boundary up.
        context: (B, S, text_dim), the encoded prompts. Two tokens stand for all zero tokens at
            the end: the same function (up to rounding) in less time.
        negative_context: like `context`, for the second forward of guidance; may be None if no
            expert uses guidance.
        low_noise: the expert for timesteps below the boundary.
        boundary: noise level in (0, 1) of the switch; given if and only if `low_noise` is.
        image_latents: (B, C, 1, H, W), normalised: a clean frame 0 at timestep 0 (TI2V).
        before_expert: called with an expert's network before its first forward and at each
            switch; CPU offload copies weights to the device in it.
        exact_timesteps: timesteps at which the networks use exact self-attention.
        halves: how processes share guidance's two forwards; None computes both here.

    Raises:
        WanError: arguments contradict each other or are out of range.
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
        halves: Halves | None = None,
    ) -> None:
        if (low_noise is None) != (boundary is None):
            raise WanError(
                f"boundary={boundary} with {'one expert' if low_noise is None else 'two experts'}: "
                "two experts need the noise level at which they switch, one expert has none"
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
        self.condition = Condition(context, first_frame=image_latents)
        self.negative_context = negative_context
        self.exact_timesteps = exact_timesteps
        self.halves = halves
        self._before_expert = before_expert
        self._active: Expert | None = None
        self._prepared: dict[tuple[int, bool], Any] = {}  # by (sample, negative)

    @property
    def context(self) -> Tensor:
        """(B, S, text_dim): the prompts from which samples are made."""
        return self.condition.context

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

        It is needed after the last step too, since a sampler changes frame 0 like the others.
        """
        return self.condition.impose(x)

    def set_context(self, context: Tensor, negative_context: Tensor | None) -> None:
        """Use other prompts from the next step on."""
        self.condition = replace(self.condition, context=context)
        self.negative_context = negative_context
        self._prepared.clear()

    def set_guidance(self, scale: float, scale_2: float) -> None:
        """Use other guidance scales from the next step on; up to 1 turns guidance off.

        Args:
            scale, scale_2: for the high-noise (or only) expert, and for the low-noise one.

        Raises:
            WanError: guidance is turned on, and there is no negative context.
        """
        low_is_active = self._active is not None and self._active is self.low_noise
        self.high_noise = self._with_scale(self.high_noise, scale)
        if self.low_noise is not None:
            self.low_noise = self._with_scale(self.low_noise, scale_2)
        if self._active is not None:  # the same network goes on: its weights stay where they are
            self._active = self.low_noise if low_is_active else self.high_noise

    def _with_scale(self, expert: Expert, scale: float) -> Expert:
        scale = scale if scale > 1 else 1.0
        if scale != 1 and self.negative_context is None:
            raise WanError(
                f"guidance_scale={scale:g} from this step on: the call began without guidance, so "
                "no negative prompt was encoded; begin with a guidance_scale above 1"
            )
        return replace(expert, guidance_scale=scale)

    def reload(self) -> None:
        """The networks' weights have changed: begin the next step as at a switch of experts."""
        self._prepared.clear()
        self._active = None

    def _switch_to(self, expert: Expert) -> None:
        # Keys and values of the text belong to the network that made them.
        self._prepared.clear()
        if self._before_expert is not None:
            self._before_expert(expert.network)
        self._active = expert

    def _guided(self, expert: Expert, x: Tensor, timestep: float, sample: int) -> Tensor:
        """v_u + g (v_c - v_u) in float32, of one sample (1, C, T, H, W)."""
        if expert.guidance_scale != 1 and self.halves is not None:
            own = self._forward(expert, x, timestep, sample, self.halves.negative)
            return guide(*self.halves.exchange(own), expert.guidance_scale)
        conditional = self._forward(expert, x, timestep, sample, negative=False)
        if expert.guidance_scale == 1:
            return conditional
        unconditional = self._forward(expert, x, timestep, sample, negative=True)
        return guide(conditional, unconditional, expert.guidance_scale)

    def _forward(
        self, expert: Expert, x: Tensor, timestep: float, sample: int, negative: bool
    ) -> Tensor:
        """One forward of one sample, float32; the text's keys and values are cached."""
        key = (sample, negative)
        if key not in self._prepared:
            context = self.negative_context if negative else self.context
            assert context is not None
            one = context[sample : sample + 1]
            self._prepared[key] = expert.network.prepare_context(one, num_text_tokens(one))
        level = torch.tensor([timestep], dtype=torch.float32, device=x.device)
        timesteps = self.condition.timesteps(level, x.shape[2])
        exact = timestep in self.exact_timesteps
        return expert.network(x, timesteps, self._prepared[key], exact=exact).float()
