"""LoRA on a pipeline under diffusers' names: load, weigh, switch, fuse, save.

The work is done by `wan.lora.adapters`; here are the arguments, and the two experts of a model.
Adapters belong to a network: a pipeline that is given another network has that one's adapters.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wan.errors import WanError, check_names
from wan.lora.adapters import Adapters, AdapterSet, Strength
from wan.lora.files import FOLDER_NAMES, PEFT_METADATA, parse_lora, read_lora
from wan.lora.merge import lora_layers, lora_tensors, write_lora
from wan.lora.names import EXPERTS
from wan.lora.source import find_lora
from wan.pipeline.folder import warn_of_attention

# One strength for all networks, or the network's name -> its strength; None means 1.
AdapterWeight = float | Mapping[str, Strength | None] | None


class PipelineAdapters:
    """The methods of a pipeline that load and switch LoRAs."""

    _lora_loadable_modules: ClassVar[Sequence[str]] = EXPERTS

    def networks(self) -> dict[str, nn.Module]:
        """The loaded transformers, by the names of their folders."""
        raise NotImplementedError

    def refuse_sharded(self, what: str) -> None:
        """Refuse what would need whole weights where each process holds a part of them."""
        raise NotImplementedError

    @property
    def adapters(self) -> AdapterSet:
        """The adapters of the networks that the pipeline has now."""
        return AdapterSet(self.networks())

    # --- loading ----------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        load_into_transformer_2: bool = False,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> None:
        """Load a LoRA; from now on it is the only active one of its network, at strength 1.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a hub id, or the tensors of a
                LoRA file by their names. Of a file for both experts one half is read.
            adapter_name: a name for it; None gives default_0, default_1 and so on.
            hotswap: put it in the place of the adapter of that name, at strength 1; the same
                adapters stay active.
            load_into_transformer_2: load it into the low-noise expert.
            weight_name, subfolder: the file in the folder or repository.
            revision, cache_dir, token, local_files_only, force_download: for the hub.
            use_safetensors: False is refused: other files can run code.
            low_cpu_mem_usage: both values give the same: nothing is initialised before.

        Raises:
            WanError: there is no such file, it does not fit the network, it is labelled for the
                other expert, the name is taken, or the weights are quantised.
        """
        del low_cpu_mem_usage
        self.refuse_sharded("load_lora_weights")
        if use_safetensors is False:
            raise WanError("use_safetensors=False: only .safetensors files are read here")
        part = EXPERTS[load_into_transformer_2]
        networks = self.networks()
        if part not in networks:
            given_as = " (load_into_transformer_2=True)" if load_into_transformer_2 else ""
            there = ", ".join(networks) or "none"
            raise WanError(f"{part}{given_as}: the transformers of this pipeline are: {there}")
        adapters = self.adapters.parts[part]
        expert = part if EXPERTS[1] in networks else None
        given = pretrained_model_name_or_path_or_dict
        if isinstance(given, Mapping):
            lora = parse_lora(given, expert=expert)
        else:
            path = find_lora(
                given,
                weight_name,
                subfolder,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
            lora = read_lora(path, expert)
        if adapter_name is None:
            adapter_name = free_name(adapters)
        attention = getattr(networks[part], "attention", None)
        if attention is not None:
            warn_of_attention(lora.path, lora.attention, str(attention.config))
        adapters.add(adapter_name, lora.copied(), hotswap)

    def unload_lora_weights(self) -> None:
        """Remove all adapters; the weights are as they were, with the fused ones in them."""
        for adapters in self.adapters.parts.values():
            adapters.unload()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters from every network that has them.

        Raises:
            WanError: no network has an adapter of that name.
        """
        names = name_list(adapter_names)
        self._check_adapters(names)
        for adapters in self.adapters.parts.values():
            adapters.remove([name for name in names if name in adapters.loras])

    # --- which of them count ----------------------------------------------------------------------

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: AdapterWeight | Sequence[AdapterWeight] = None,
    ) -> None:
        """Make these adapters the active ones, with their strengths.

        Args:
            adapter_names: names of adapters of any network.
            adapter_weights: a strength for all of them, or a list of one for each: a number, None
                for 1, or {"transformer": .., "transformer_2": ..}, where a network that is not
                named has 1. There, {part of diffusers' names of layers: number} may stand in place
                of a number.

        Raises:
            WanError: an adapter is unknown, the numbers of names and strengths differ, or a
                strength is not a finite number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = weight_list(names, adapter_weights)
        self._check_adapters(names)
        found = self.adapters.parts
        for part, adapters in found.items():
            strengths: dict[str, Strength] = {}
            for name, weight in zip(names, weights, strict=True):
                strength = weight_for(part, weight)
                if name in adapters.loras:
                    strengths[name] = 1.0 if strength is None else strength
                elif strength is not None and isinstance(weight, Mapping):
                    warnings.warn(
                        f"adapter {name!r} has no weights for {part}: no strength counts there",
                        stacklevel=2,
                    )
            adapters.activate(strengths)

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters of all networks."""
        found = self.adapters.parts.values()
        return list(dict.fromkeys(name for adapters in found for name in adapters.active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all adapters, by network."""
        found = self.adapters.parts
        return {part: list(adapters.loras) for part, adapters in found.items() if adapters.loras}

    def enable_lora(self) -> None:
        """Switch the active adapters on again."""
        for adapters in self.adapters.parts.values():
            adapters.enable(True)

    def disable_lora(self) -> None:
        """Run without any adapter until `enable_lora`."""
        for adapters in self.adapters.parts.values():
            adapters.enable(False)

    def set_lora_device(
        self, adapter_names: str | Sequence[str], device: torch.device | str | int
    ) -> None:
        """Keep the factors of adapters on a device; see `wan.lora.adapters.Adapters.move`."""
        names = name_list(adapter_names)
        self._check_adapters(names)
        for adapters in self.adapters.parts.values():
            for name in names:
                if name in adapters.loras:
                    adapters.move(name, torch.device(device))

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Do nothing: ranks may differ, and compiled networks need no preparation here."""
        del target_rank, check_compiled

    # --- fusing -----------------------------------------------------------------------------------

    def fuse_lora(
        self,
        components: Sequence[str] = (EXPERTS[0],),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Keep adapters in the weights until `unfuse_lora`, or for good after an unload.

        Args:
            components: the networks; both experts are ["transformer", "transformer_2"].
            lora_scale: factor on the strengths.
            safe_fusing: refuse if a weight would become infinite or NaN.
            adapter_names: the adapters; None fuses the active ones.

        Raises:
            WanError: a network or adapter is unknown; or see `safe_fusing`.
        """
        for adapters in self._components(components):
            names = None
            if adapter_names is not None:
                self._check_adapters(name_list(adapter_names))
                names = [name for name in name_list(adapter_names) if name in adapters.loras]
            adapters.fuse(names, lora_scale, safe_fusing)

    def unfuse_lora(self, components: Sequence[str] = (EXPERTS[0],)) -> None:
        """Take fused adapters out of the weights again, bit for bit."""
        for adapters in self._components(components):
            adapters.unfuse()

    @property
    def fused_loras(self) -> set[str]:
        """The names of the adapters that are fused."""
        found = self.adapters.parts.values()
        return {name for adapters in found for name in (*adapters.fused, *adapters.settled)}

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    def _components(self, components: Sequence[str]) -> list[Adapters]:
        names = name_list(components)
        if not names:
            raise WanError(f"components: empty; choose from {', '.join(EXPERTS)}")
        check_names("components", names, EXPERTS)
        found = self.adapters.parts
        return [found[part] for part in names if part in found]

    # --- saving -----------------------------------------------------------------------------------

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
        *,
        transformer_2_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        transformer_2_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write trained pairs as a LoRA file that diffusers reads too.

        Args:
            save_directory: a folder, made if it is missing.
            transformer_lora_layers: the pairs of the high-noise or only network: tensors by names
                as peft's `get_peft_model_state_dict` gives them, or one of our networks with pairs
                (`wan.lora.merge.add_lora`).
            is_main_process: False writes nothing.
            weight_name: None is pytorch_lora_weights.safetensors.
            save_function: called with (tensors, path) in place of our writer.
            safe_serialization: False is refused: pickles can run code.
            transformer_lora_adapter_metadata: peft's settings, such as lora_alpha.
            transformer_2_lora_layers, transformer_2_lora_adapter_metadata: the same for the
                low-noise expert.

        Raises:
            WanError: nothing to write, names that no reader would know, or a file where the folder
                should be.
        """
        if not safe_serialization:
            raise WanError("safe_serialization=False: only .safetensors files are written here")
        folder = Path(save_directory)
        name = weight_name or FOLDER_NAMES[0]
        if not name.endswith(".safetensors"):
            raise WanError(f"weight_name={weight_name}: must end in .safetensors")
        if folder.is_file():
            raise WanError(f"save_directory={save_directory}: a file; give a folder")
        layers = (transformer_lora_layers, transformer_2_lora_layers)
        settings = (transformer_lora_adapter_metadata, transformer_2_lora_adapter_metadata)
        tensors: dict[str, Tensor] = {}
        entries: dict[str, Any] = {}
        for part, given, about in zip(EXPERTS, layers, settings, strict=True):
            if about and not given:
                raise WanError(f"{part}_lora_adapter_metadata without {part}_lora_layers")
            if given:
                tensors |= {f"{part}.{key}": value for key, value in pairs_of(given).items()}
                entries |= {
                    f"{part}.{key}": jsonable(value) for key, value in (about or {}).items()
                }
        if not tensors:
            raise WanError("nothing to save: give transformer_lora_layers")
        metadata = {PEFT_METADATA: json.dumps(entries, sort_keys=True)} if entries else {}
        for part, given in zip(EXPERTS, layers, strict=True):
            if given:  # readable, or an error that names what is not
                parse_lora(tensors, metadata, "to be saved", part)
        if not is_main_process:
            return
        path = folder / name
        if save_function is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_function(tensors, str(path))
        else:
            write_lora(path, tensors, metadata)

    # --- helpers ----------------------------------------------------------------------------------

    def _check_adapters(self, names: Sequence[str]) -> None:
        known = {name for found in self.get_list_adapters().values() for name in found}
        if unknown := [name for name in names if name not in known]:
            there = f"there are {', '.join(sorted(known))}" if known else "none is loaded"
            raise WanError(f"adapters: unknown {', '.join(unknown)}; {there}")


def free_name(adapters: Adapters) -> str:
    number = len(adapters.loras)
    while f"default_{number}" in adapters.loras:
        number += 1
    return f"default_{number}"


def name_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


def weight_list(
    names: Sequence[str], weights: AdapterWeight | Sequence[AdapterWeight]
) -> list[AdapterWeight]:
    """One weight for each name.

    Raises:
        WanError: there are more or fewer weights than names.
    """
    several = isinstance(weights, Sequence) and not isinstance(weights, str)
    found: list[Any] = list(weights) if several else [weights] * len(names)  # type: ignore[arg-type]
    if len(found) != len(names):
        raise WanError(
            f"{len(names)} adapter_names and {len(found)} adapter_weights: give one for each"
        )
    parts = {part for weight in found if isinstance(weight, Mapping) for part in weight}
    if unknown := sorted(parts.difference(EXPERTS)):
        warnings.warn(
            f"adapter_weights: {', '.join(unknown)} are ignored; known are {', '.join(EXPERTS)}",
            stacklevel=3,
        )
    return found


def weight_for(part: str, weight: Any) -> Any:
    """The strength of an adapter in one network; None where nothing is said of it."""
    return weight.get(part) if isinstance(weight, Mapping) else weight


def pairs_of(given: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LoRA by diffusers' names, without a network's name in front."""
    if isinstance(given, nn.Module) and lora_layers(given):
        return lora_tensors(given)
    state = given.state_dict() if isinstance(given, nn.Module) else given
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else value
