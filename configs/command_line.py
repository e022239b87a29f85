"""How a command's arguments are read, and the text that explains them (`--help`)."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import configs
from configs.schema import walk_options

CONFIG_FOLDER = Path(configs.__file__).parent


@dataclass(frozen=True)
class Shortcut:
    """A short name for a nested option; setting it sets the options in `clears` to null."""

    key: str
    clears: tuple[str, ...] = ()


# What every command has beside its settings: name -> its type and default, and its help.
COMMON = {
    "progress": (
        "true/false [True]",
        "say what takes long, and for how long; in files and pipes a line every ten seconds",
    )
}
ATTENTION = {"attention": Shortcut("attention.name")}


@dataclass(frozen=True)
class CommandLine:
    """How the arguments of one command are read.

    Attributes:
        schema: the command's dataclass, in `configs`.
        config_name: its YAML file in configs/, without the ending.
        text_keys: options whose value is a text, which is always literal.
        text_lists: options whose value is a list of texts. Each time the option is given adds one,
            which is literal; a list in brackets is read as any other.
        path_keys: options whose value is a path: literal too, except that `null` means none and
            that a comma separates values in a sweep.
        list_keys: options whose value is a list of paths, written a,b or [a,b] and literal too; an
            option given several times adds to its list. In a sweep, a comma outside of brackets
            separates values.
        shortcuts: short names for nested options.
        written: options that name an output file; two points of a sweep may not name the same.
        words: options whose value may be typed alone, in this order: FILE in place of record=FILE.
    """

    schema: type
    config_name: str
    text_keys: tuple[str, ...] = ("prompt", "negative_prompt")
    text_lists: tuple[str, ...] = ()
    path_keys: tuple[str, ...] = ()
    list_keys: tuple[str, ...] = ()
    shortcuts: Mapping[str, Shortcut] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def short_key(line: CommandLine, key: str) -> str:
    """The name under which a person types an option."""
    return next((short for short, s in line.shortcuts.items() if s.key == key), key)


def option_names(schema: type) -> list[str]:
    return [name for name, _, _ in walk_options(schema)]


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def preset_groups(config_name: str) -> list[str]:
    """The groups that a command chooses presets from: the `group: preset` lines of its defaults."""
    defaults = read_yaml(CONFIG_FOLDER / f"{config_name}.yaml").get("defaults", [])
    return [group for entry in defaults if isinstance(entry, dict) for group in entry]


def preset_names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def preset_checkpoint(name: str) -> str:
    """The checkpoint that a preset of a model names."""
    return read_yaml(CONFIG_FOLDER / "model" / f"{name}.yaml")["checkpoint"]


def list_of(kind: Any) -> Any:
    """The kind of the entries of a list, or None where an option is no list."""
    for one in (kind, *get_args(kind)):
        if get_origin(one) is list:
            return get_args(one)[0]
    return None


def takes_texts(kind: Any) -> bool:
    """Whether an option takes a text, or a list of them."""
    entry = kind if list_of(kind) is None else list_of(kind)
    return get_origin(entry) is not dict and str in (entry, *get_args(entry))


def kind_in_words(kind: Any, several: bool = False) -> str:
    """What an option takes, for an error."""
    if (entries := list_of(kind)) is not None:
        if (inner := list_of(entries)) is not None:
            return f"a list of lists of {kind_in_words(inner, True)}, written [[a,b],[c,d]]"
        return f"a list of {kind_in_words(entries, True)}, written a,b or [a,b]"
    if get_origin(kind) is dict:
        return "settings, written {name: value}"
    choices = [one for one in (get_args(kind) or (kind,)) if one is not type(None)]
    names = {
        str: ("a text", "texts"),
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
    }
    words = names[choices[0]][several]
    return words + ", or null" * (type(None) in get_args(kind) and not several)


def _type_name(kind: Any) -> str:
    args = [a for a in get_args(kind) if a is not type(None)]
    if getattr(kind, "__origin__", None) is list:
        return "list of " + _type_name(args[0])
    if args and getattr(kind, "__origin__", None) is None:  # X | None
        return _type_name(args[0])
    names = {str: "text", int: "integer", float: "number", bool: "true/false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def help_text(line: CommandLine, description: str, flags: Mapping[str, str]) -> str:
    """The text of `--help`: the description, every option with its default, presets and flags."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_FOLDER)):
        cfg = compose(line.config_name, return_hydra_config=True)
    presets = {group: cfg.hydra.runtime.choices[group] for group in preset_groups(line.config_name)}
    lines = [
        description.strip(),
        "",
        "Options, written name=value [default, with the preset named below]:",
    ]
    for name, kind, item in walk_options(line.schema):
        value = OmegaConf.select(cfg, name, default=_default(item))
        shown = "none" if value is None else str(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        left = f"  {short_key(line, name)}= {_type_name(kind)} [{shown}]"
        lines.append(f"{left:<44}  {item.metadata.get('help', '')}".rstrip())
    for name, (kind_and_default, help) in COMMON.items():
        lines.append(f"{f'  {name}= {kind_and_default}':<44}  {help}")
    for group, choice in sorted(presets.items()):
        lines += ["", f"Presets, written {group}=name [{choice}]:"]
        for name in preset_names(group):
            lines.append(f"  {name:<20}{_first_comment(CONFIG_FOLDER / group / f'{name}.yaml')}")
    lines += ["", "Flags:"] + [f"  {flag:<20}{text}" for flag, text in flags.items()]
    return "\n".join(lines)


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _first_comment(path: Path) -> str:
    for text in path.read_text(encoding="utf-8").splitlines():
        if text.startswith("#") and "@package" not in text:
            return text.lstrip("# ")
    return ""
