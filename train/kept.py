"""A run by what its folder holds, for whoever exports without having trained.

A checkpoint keeps the settings of its run. The command that trained says from them what becomes of
the weights (`left_by` in its module), as it does at the end of the run.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from configs.export import ExportConfig
from configs.progress import doing
from configs.schema import kept_config
from train.artefact import EXPORTS, Artefacts, Places, step_places, write_new
from train.checkpoint import list_checkpoints, load_checkpoint, load_newest, name_of, step_of
from train.loop import TREE_KINDS
from wan.errors import WanError
from wan.files import expanded
from wan.settings import check_kinds
from wan.weights.hub import resolve_model

C = TypeVar("C")

# The network that a training command exports, by its name in checkpoints -> the command.
COMMANDS = {
    "dit": "train.finetune",
    "student": "train.distill",
    "vae": "train.vae",
    "both": "train.text_encoder",
}


def export_kept(config: ExportConfig) -> None:
    """Write what is made of one checkpoint.

    Raises:
        WanError: there is no such checkpoint or no such model, or the output is there already.
    """
    folder = expanded(config.run)
    with doing("reading the checkpoint"):
        tree = read_state(config, folder / "checkpoints")
    artefacts = left_by(config, folder, tree)
    weights = weights_of(config, tree, artefacts.network)
    places = named_places(config, folder, tree["step"], artefacts)
    if there := [str(place) for _, place in places if place.exists()]:
        raise WanError(
            f"{' and '.join(there)}: there already, and nothing is written over; choose another "
            "output="
        )
    print(f"step {tree['step']} of {folder}")
    write_new(weights, places)


def read_state(config: ExportConfig, checkpoints: Path) -> dict[str, Any]:
    """The state that a checkpoint keeps; of its tensors, only those that are exported.

    Raises:
        WanError: there is no such checkpoint; names those that are there.
    """

    def exported(tree: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(
            f"{'modules' if is_current(config, tree, name) else 'averages'}.{name}."
            for name in COMMANDS
            if name in tree["modules"]
        )

    steps = [step_of(folder) for folder in list_checkpoints(checkpoints)]
    if not steps:
        raise WanError(
            f"run={config.run}: no checkpoint in {checkpoints}; run= is the output_dir of a "
            "training command that has made one"
        )
    if config.step not in (None, *steps):
        raise WanError(
            f"step={config.step}: no checkpoint of it in {checkpoints}; there are those of "
            f"{', '.join(map(str, steps))}"
        )
    if config.step is None:
        tree = load_newest(checkpoints, choose=exported)
        assert tree is not None
    else:
        tree = load_checkpoint(checkpoints / name_of(config.step), choose=exported)
    check_kinds(tree, TREE_KINDS, f"{checkpoints}, the state of a checkpoint", TREE_KINDS)
    return tree


def is_current(config: ExportConfig, tree: Mapping[str, Any], network: str) -> bool:
    """Whether a network is exported as the last step left it, not averaged."""
    wanted = config.weights or ("ema" if network in tree["averages"] else "current")
    return wanted == "current"


def left_by(config: ExportConfig, folder: Path, tree: Mapping[str, Any]) -> Artefacts:
    """What becomes of the run's network, as the command that trained it says.

    Raises:
        WanError: no command is known that trains such networks; a model that the run started from
            is not found or is another one; or one was named that has no part.
    """
    found = [name for name in COMMANDS if name in tree["modules"]]
    if not found:
        raise WanError(
            f"run={config.run}: its checkpoints hold {', '.join(tree['modules'])}; exported are "
            f"those of {', '.join(COMMANDS.values())}"
        )
    places = {"checkpoint": config.checkpoint, "start": config.start}
    kept = KeptRun(folder, tree["settings"], places)
    artefacts: Artefacts = importlib.import_module(f"{COMMANDS[found[0]]}.run").left_by(kept)
    for name, place in places.items():
        if place is not None and name not in kept.used:
            raise WanError(f"{name}={place}: nothing is read from it for this export; leave it out")
    return artefacts


def weights_of(config: ExportConfig, tree: Mapping[str, Any], network: str) -> dict[str, Tensor]:
    """The weights of a network in a checkpoint.

    Raises:
        WanError: averages are asked for, and the run has none.
    """
    if is_current(config, tree, network):
        return tree["modules"][network]
    if network not in tree["averages"]:
        raise WanError(f"weights=ema: {config.run} keeps no averages; leave weights= out")
    return tree["averages"][network]["weights"]


def named_places(config: ExportConfig, folder: Path, step: int, artefacts: Artefacts) -> Places:
    """Where the artefacts of a step go.

    Raises:
        WanError: the name is that of a LoRA, and the run trains none.
    """
    if config.output is None:
        ending = "-current" if config.weights == "current" else ""
        return step_places(artefacts.made, folder / EXPORTS / f"{name_of(step)}{ending}")
    output = expanded(config.output)
    if not output.name:  # . or /
        raise WanError(f"output={config.output}: is there already; name a new folder or file")
    if output.suffix != ".safetensors":
        return step_places(artefacts.made, output)
    loras = [one for one in artefacts.made if one.ending == output.suffix]
    if not loras:
        raise WanError(
            f"output={config.output}: the name of a LoRA file, and this run leaves a folder; give "
            "a name without .safetensors"
        )
    return [(one, output) for one in loras]


class KeptRun:
    """A run as its folder tells of it, for whoever exports without having trained.

    Args:
        folder: the run's output_dir.
        settings: what a checkpoint of it keeps.
        places: where models lie that have moved since, by the names of options.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], places: Mapping[str, str | None]
    ) -> None:
        self.folder, self.settings, self.places = folder, settings, places
        self.used: set[str] = set()  # the options that had a part

    def config(self, schema: type[C]) -> C:
        """The settings of its command.

        Raises:
            WanError: they are not those of the command.
        """
        return kept_config(schema, self.settings, str(self.folder))

    def model(self, option: str, name: str, digest: str, digest_of: Callable[[Path], str]) -> Path:
        """The folder of a model that the run started from.

        Args:
            option: of `train.export`, by which a model that has moved is given.
            name: what the run keeps of its place, which may be the last name alone.
            digest: under which name the run keeps the digest of its weights.
            digest_of: what gives that digest.

        Raises:
            WanError: it is not found, or has other weights than the run started from.
        """
        self.used.add(option)
        given = self.places.get(option)
        try:
            found = resolve_model(given or name)
        except WanError as error:
            if given is not None:
                raise WanError(f"{option}={error}") from error
            raise WanError(
                f"{self.folder}: started from {name}, which is not found here ({error}); say with "
                f"{option}=FOLDER where it lies now"
            ) from error
        kept = self.settings.get(digest)
        if kept is not None and digest_of(found) != kept:
            raise WanError(
                f"{found}: has other weights than the model that the run in {self.folder} started "
                f"from ({name}); say with {option}=FOLDER where that one lies"
            )
        return found
