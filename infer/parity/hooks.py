"""Matching tensors inside two models, recorded while both run: ours and the reference's.

The key map says which of our modules holds the same parameters as which of theirs; hooks on both
record what goes in and comes out. The order is that in which our modules run, so the first tensor
that differs lies next to the mistake.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wan.weights.keys import VAELevels, released_name

Points = list[tuple[str, Tensor, Tensor]]  # name, ours, theirs
Align = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]

# transformers calls the encoder's own name for the shared embedding.
CALLED_AS = {"shared": "encoder.embed_tokens"}


def matching_modules(
    component: str, module: nn.Module, vae_levels: VAELevels | None = None
) -> dict[str, str]:
    """Names of our modules that own parameters -> names of the modules that own them there.

    Left out is what owns parameters at the top level of the reference: its output is the model's.
    """
    pairs = {}
    for name in module.state_dict():
        theirs = released_name(component, "diffusers", name, vae_levels).rpartition(".")[0]
        if theirs:
            pairs[name.rpartition(".")[0]] = CALLED_AS.get(theirs, theirs)
    return pairs


@contextmanager
def recording(module: nn.Module, names: Mapping[str, str], inputs: bool) -> Iterator[dict]:
    """Record the results of submodules while the context lasts.

    Args:
        names: label -> name of a submodule.
        inputs: record each one's first argument too, as "<label> input".
    Yields:
        A dict that fills with label -> list of tensors, one per call, in order of the first call.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for label, name in names.items():

        def hook(module: nn.Module, arguments: tuple, output: Tensor, label: str = label) -> None:
            if inputs:
                seen.setdefault(f"{label} input", []).append(arguments[0].detach().clone())
            seen.setdefault(label, []).append(output.detach().clone())

        handles.append(module.get_submodule(name).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def matched(
    ours: Mapping[str, list[Tensor]],
    theirs: Mapping[str, list[Tensor]],
    align: Align,
    join: Callable[[list[Tensor]], Tensor],
) -> Points:
    """Pairs of recorded tensors in our order.

    Args:
        join: makes one tensor of those of several calls.
        align: brings the layouts of one pair together.
    Raises:
        AssertionError: a module ran on one side only; then the pairs prove nothing about it.
    """
    unmatched = sorted(set(ours) ^ set(theirs))
    assert not unmatched, f"ran on one side only: {', '.join(unmatched)}"
    return [(name, *align(name, join(ours[name]), join(theirs[name]))) for name in ours]


def join_calls(tensors: list[Tensor]) -> Tensor:
    """Chunks of a clip back to back: volumes (B, C, T, H, W) along T, frames (T, C, H, W) too."""
    return torch.cat(tensors, dim=2 if tensors[0].ndim == 5 else 0)


def single_call(tensors: list[Tensor]) -> Tensor:
    assert len(tensors) == 1, "one call expected"
    return tensors[0]


def align_transformer(name: str, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten their volumes to tokens, and repeat our time embedding where theirs is longer."""
    if name == "patch_embedding":  # a convolution there
        theirs = theirs.flatten(2).transpose(1, 2)
    if name.startswith("time_"):
        theirs = theirs.unsqueeze(1) if theirs.ndim == 2 else theirs
        ours = ours.repeat_interleave(theirs.shape[1] // ours.shape[1], dim=1)
    return ours, theirs


def align_text(name: str, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The reference also encodes padding: keep what belongs to real tokens."""
    return ours, theirs[tuple(slice(size) for size in ours.shape)]


def align_vae(name: str, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    return ours, theirs
