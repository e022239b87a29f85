"""LoRAs that are switched on and off in a loaded network.

    adapters = adapters_of(dit)
    adapters.add("style", read_lora("style.safetensors"))  # active from now on, at strength 1
    adapters.activate({"style": 0.5})
    adapters.remove(["style"])                             # the weights are as they were

The weights at any time are  original + sum of strength * change,  summed in float32 and rounded
once: what `merge_lora` gives for one LoRA. They are written in place, so that compiled blocks and
CPU offload keep working, and a forward costs what it cost without. Of each changed parameter the
original is kept in the memory of the CPU, and comes back bit for bit.

Names and meanings are those of diffusers and peft: a LoRA that was added is the only active one
until `activate` says otherwise. Fused LoRAs stay in the weights whatever is active, and layers that
hold a fused LoRA show no other.
"""

import copy
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from wan.errors import WanError, check_names
from wan.lora.files import LoRA
from wan.lora.merge import changes_of, check_fit
from wan.weights.keys import released_name
from wan.weights.names import grouped
from wan.weights.quantize import refuse_quantized

ATTRIBUTE = "lora_adapters"  # of a network that has some
# One number, or parts of diffusers' names of layers -> a number; layers that none names have 1.
Strength = float | Mapping[str, float]
# What a parameter holds beside its original: (LoRA, strength), in the order of their sum.
Terms = tuple[tuple[LoRA, float], ...]


def adapters_of(network: nn.Module) -> "Adapters":
    """The adapters of a network, which it carries along; for a compiled one, those inside it."""
    network = cast(nn.Module, getattr(network, "_orig_mod", network))
    if ATTRIBUTE not in network.__dict__:
        network.__dict__[ATTRIBUTE] = Adapters(network)
    found = network.__dict__[ATTRIBUTE]
    assert isinstance(found, Adapters)
    return found


class Adapters:
    """The LoRAs of one loaded network; get it from `adapters_of`.

    Attributes:
        loras: every LoRA by the name of its adapter, in the order in which they were added.
        active: the names of the active ones.
        fused: fused LoRAs -> their strength when they were fused.
        settled: names of fused LoRAs that were removed since: their changes are in the originals.
        enabled: False while all adapters are switched off.
        pending: True if something changed during a call; see `scaled`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.loras: dict[str, LoRA] = {}
        self.active: list[str] = []
        self.fused: dict[str, Strength] = {}
        self.settled: set[str] = set()
        self.enabled = True
        self.pending = False
        self._network = network
        self._strengths: dict[str, Strength] = {}
        self._scale = 1.0  # of a call, on all active adapters
        self._at_work = False
        self._originals: dict[str, Tensor] = {}  # on the CPU
        self._written: dict[str, Terms] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapters":
        """For a copy of the network: files and originals are shared, since they never change."""
        twin = Adapters(copy.deepcopy(self._network, memo))
        own = {key: copy.copy(value) for key, value in vars(self).items() if key != "_network"}
        vars(twin).update(own)
        return twin

    # --- which adapters there are -----------------------------------------------------------------

    def add(self, name: str, lora: LoRA, hotswap: bool = False) -> None:
        """Add a LoRA under a name, and make it the only active one.

        As in peft, fused adapters are taken out of the weights by it, with a warning.

        Args:
            hotswap: put it in the place of the adapter of that name, at strength 1; the same
                adapters stay active.

        Raises:
            WanError: the name is taken (or, with `hotswap`, is not); the LoRA does not fit the
                network; its weights are quantised or not loaded yet.
        """
        if hotswap:
            self._check([name])
        elif name in self.loras:
            raise WanError(
                f"adapter_name={name!r}: in use already; choose another name, or remove that "
                f"adapter first with delete_adapters({name!r})"
            )
        refuse_quantized(
            self._network,
            "a LoRA is merged before they are rounded: "
            'from_pretrained(.., loras={"transformer": LoRAMerge(read_lora(path), strength)})',
        )
        parameters = dict(self._network.named_parameters())
        check_fit(parameters, lora)
        unloaded = [one for one in lora.names if parameters[one].is_meta]
        if unloaded:
            raise WanError(f"LoRA {lora.path}: load the model's weights first: {grouped(unloaded)}")
        if hotswap and name in self.fused:
            raise WanError(f"adapter {name!r} is fused: unfuse_lora() before it is replaced")
        self.loras[name] = lora
        if self.fused:
            warnings.warn(
                f"{', '.join(self.fused)}: no longer fused, since another LoRA was loaded; call "
                "unload_lora_weights() after fuse_lora() to keep it in the weights for good",
                stacklevel=3,
            )
            self.unfuse()
        self._strengths[name] = 1.0
        if not hotswap:
            self.active = [name]
        if not self.enabled:
            warnings.warn(
                f"LoRA adapter {name!r} has no effect yet: adapters are switched off; call "
                "enable_lora()",
                stacklevel=3,
            )
        self.apply()

    def remove(self, names: Iterable[str]) -> None:
        """Remove adapters. Fused ones stay in the weights for good.

        If no active adapter is left, the first of the others in the alphabet becomes active, as in
        peft, with a warning.
        """
        names = list(dict.fromkeys(names))
        self._check(names)
        self._settle([name for name in names if name in self.fused])
        was_active = bool(self.active)
        for name in names:
            del self.loras[name], self._strengths[name]
        self.active = [name for name in self.active if name in self.loras]
        if was_active and not self.active and self.loras:
            self.active = sorted(self.loras)[:1]
            warnings.warn(
                f"all active LoRA adapters were deleted; {self.active[0]!r} is active now",
                stacklevel=3,
            )
        self.apply()

    def unload(self) -> None:
        """Remove all adapters. Fused ones stay in the weights for good."""
        self._settle(list(self.fused))
        self.loras.clear()
        self._strengths.clear()
        self.active, self.enabled = [], True
        self.apply()

    # --- which of them count ----------------------------------------------------------------------

    def activate(self, strengths: Mapping[str, Strength]) -> None:
        """Make these adapters the active ones, each with its strength.

        Raises:
            WanError: an adapter is unknown, or a strength is not a finite number.
        """
        self._check(list(strengths))
        for name, strength in strengths.items():
            check_strength(name, strength)
        self._strengths |= strengths
        self.active = list(strengths)
        self.apply()
        self._warn_of_hidden()

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off, fused ones too."""
        self.enabled = enabled
        self.apply()

    def fuse(
        self, names: Iterable[str] | None = None, scale: float = 1.0, check_finite: bool = False
    ) -> None:
        """Keep adapters in the weights, whatever is active later, until `unfuse`.

        Args:
            names: the adapters; None takes the active ones.
            scale: factor on their strengths.
            check_finite: refuse if a weight would become infinite or NaN.

        Raises:
            WanError: an adapter is unknown, the scale is not finite, or see `check_finite`.
        """
        names = self.active if names is None else list(names)
        self._check(names)
        check_strength("lora_scale", scale)
        if not names:
            warnings.warn("fuse_lora: no LoRA adapter to fuse in this network", stacklevel=3)
        before = dict(self.fused)
        for name in names:
            if name in self.fused:
                warnings.warn(f"LoRA adapter {name!r} is fused already", stacklevel=3)
            else:
                self.fused[name] = scaled(self._strengths[name], scale)
        if check_finite:
            broken = [name for name, terms in self._wanted().items() if not self._fits(name, terms)]
            if broken:
                self.fused = before
                raise WanError(f"not finite once fused: {grouped(broken)}; use a lower strength")
        self.apply()

    def unfuse(self) -> None:
        """Take fused adapters out of the weights; they are active or not as before."""
        self.fused.clear()
        self.settled.clear()
        self.apply()

    def move(self, name: str, device: torch.device) -> None:
        """Keep the factors of an adapter on a device, where the next change of weights uses them.

        Adapters work from any device, since the weights hold their changes.
        """
        self.loras[name] = self.loras[name].copied(device)
        self.apply()

    # --- calls ------------------------------------------------------------------------------------

    @contextmanager
    def scaled(self, scale: float = 1.0) -> Iterator[None]:
        """For the time of a call: `scale` is a factor on every active adapter that is not fused.

        Changes to the adapters in this time, as from a callback, are not written to the weights,
        which offload may be copying: `pending` becomes true, and `apply` with `now` writes them
        where it is safe. What is left is written at the end.
        """
        check_strength('attention_kwargs["scale"]', scale)
        self._scale = scale
        self.apply()
        self._at_work = True
        try:
            yield
        finally:
            self._at_work, self._scale = False, 1.0
            self.apply()

    @torch.no_grad()
    def apply(self, now: bool = False) -> None:
        """Write the weights that the adapters ask for; during a call only with `now`."""
        if self._at_work and not now:
            self.pending = True
            return
        self.pending = False
        wanted = self._wanted()
        parameters = dict(self._network.named_parameters())
        for name in [*wanted, *(name for name in self._written if name not in wanted)]:
            terms = wanted.get(name, ())
            if terms == self._written.get(name, ()):
                continue
            parameter = parameters[name]
            if name not in self._originals:
                self._originals[name] = parameter.detach().to("cpu", copy=True)
            parameter.copy_(self._value(name, terms))
            if terms:
                self._written[name] = terms
            else:
                del self._originals[name]
                self._written.pop(name, None)

    # --- helpers ----------------------------------------------------------------------------------

    def _check(self, names: list[str]) -> None:
        if not self.loras and names:
            raise WanError(f"adapter {', '.join(names)}: no LoRA is loaded; see load_lora_weights")
        check_names("adapters", names, list(self.loras))

    def _wanted(self) -> dict[str, Terms]:
        """Parameter -> what it holds beside its original, if anything.

        LoRAs are compared by identity, so that an adapter that was replaced counts as a change.
        """
        if not self.enabled:
            return {}
        fused_layers = self._fused_layers()
        terms: dict[str, list[tuple[LoRA, float]]] = {}
        chosen = [(name, strength, 1.0) for name, strength in self.fused.items()]
        chosen += [
            (name, self._strengths[name], self._scale)
            for name in self.active
            if name not in self.fused
        ]
        for adapter, strength, scale in chosen:
            lora = self.loras[adapter]
            for name in lora.names:
                factor = scale * strength_at(strength, name)
                hidden = adapter not in self.fused and layer_of(name) in fused_layers
                if factor != 0 and not hidden:
                    terms.setdefault(name, []).append((lora, factor))
        return {name: tuple(found) for name, found in terms.items()}

    def _fused_layers(self) -> set[str]:
        return {layer_of(name) for adapter in self.fused for name in self.loras[adapter].names}

    def _warn_of_hidden(self) -> None:
        """Warn of active adapters that fused ones keep from having an effect."""
        layers = self._fused_layers()
        for adapter in self.active:
            names = [] if adapter in self.fused else self.loras[adapter].names
            hidden = [name for name in names if layer_of(name) in layers]
            if hidden:
                warnings.warn(
                    f"LoRA adapter {adapter!r} has no effect in layers where "
                    f"{', '.join(self.fused)} is fused: {grouped(hidden, limit=3)}; call "
                    "unfuse_lora() to use both",
                    stacklevel=4,
                )

    def _value(self, name: str, terms: Terms) -> Tensor:
        """The parameter with its terms, in its dtype, on its device."""
        parameter = self._network.get_parameter(name)
        original = self._originals.get(name, parameter.detach()).to(parameter.device)
        if not terms:
            return original
        total = original.to(torch.float32, copy=True)
        for lora, factor in terms:
            for change in changes_of(lora, name):
                total += change.delta(total.device).mul_(factor).reshape(total.shape)
        return total.to(parameter.dtype)

    def _fits(self, name: str, terms: Terms) -> bool:
        return bool(torch.isfinite(self._value(name, terms)).all())

    @torch.no_grad()
    def _settle(self, names: list[str]) -> None:
        """Add fused adapters to the originals for good."""
        if not names:
            return
        if self._at_work:
            raise WanError("fused LoRA adapters cannot be removed during a call; do it after it")
        kept = {name: self.fused[name] for name in names}
        everything = self.fused, self.active, self.enabled
        self.fused, self.active, self.enabled = kept, [], True
        self.apply()
        for name in list(self._written):
            del self._written[name], self._originals[name]
        self.fused, self.active, self.enabled = everything
        for name in names:
            del self.fused[name]
        self.active = [name for name in self.active if name not in names]
        self.settled |= set(names)


class AdapterSet:
    """The adapters of all networks of a model.

    Attributes:
        parts: "transformer" or "transformer_2" -> the adapters of that network.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.parts = {part: adapters_of(network) for part, network in networks.items()}

    @property
    def pending(self) -> bool:
        """Whether adapters have changed during a call without being written to the weights."""
        return any(adapters.pending for adapters in self.parts.values())

    def write(self) -> None:
        """Write pending changes; no network may be on its way to the device or back."""
        for adapters in self.parts.values():
            if adapters.pending:
                adapters.apply(now=True)

    @contextmanager
    def scaled(self, scale: float = 1.0) -> Iterator[None]:
        """For the time of a call; see `Adapters.scaled`."""
        with ExitStack() as stack:
            for adapters in self.parts.values():
                stack.enter_context(adapters.scaled(scale))
            yield


def layer_of(name: str) -> str:
    """The layer of a parameter."""
    return name.rpartition(".")[0]


def check_strength(name: str, strength: Strength) -> None:
    """Refuse a strength that is no finite number."""
    for value in strength.values() if isinstance(strength, Mapping) else [strength]:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise WanError(f"{name}: strength {value!r}: must be a finite number")


def scaled(strength: Strength, scale: float) -> Strength:
    if isinstance(strength, Mapping):
        return {layers: scale * value for layers, value in strength.items()}
    return scale * strength


def strength_at(strength: Strength, name: str) -> float:
    """The strength at a parameter: that of the first part that its layer's name contains."""
    if not isinstance(strength, Mapping):
        return float(strength)
    layer = layer_of(released_name("transformer", "diffusers", name))
    return float(next((value for part, value in strength.items() if part in layer), 1.0))
