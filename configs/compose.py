"""From arguments to the checked settings of each run.

Hydra composes the YAML and parses `name=value`; the dataclass of the command checks the result.
Free text never meets Hydra's grammar: it is taken out of the arguments first and put back into the
dataclass afterwards, so that commas, quotes, brackets, `${...}` and `null` in a prompt are plain
text.
"""

import csv
import difflib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from configs.command_line import (
    COMMON,
    CONFIG_FOLDER,
    CommandLine,
    kind_in_words,
    list_of,
    option_names,
    preset_checkpoint,
    preset_groups,
    preset_names,
    read_yaml,
    short_key,
    takes_texts,
)
from configs.foreign_names import FOREIGN_NAMES
from configs.schema import Options, check_text, default_of, read_config, walk_options
from wan.errors import WanError

C = TypeVar("C")
Text = str | list[str] | None  # the value of an option that is taken literally


# An entry that Hydra's grammar reads as a number, or as true or false.
LIKE_NUMBER = re.compile(
    r"(^|[\[,])\s*([-+]?(?:[\d_.]+(?:e[-+]?[\d_]+)?|nan|inf)|true|false)\s*(?=$|[\],])", re.I
)


@dataclass(frozen=True)
class Run(Generic[C]):
    """The settings of one point of a sweep, or of the only run.

    Attributes:
        config: the command's settings, checked.
        sources: where the value of each option comes from, by dotted name: "command line", a
            preset as `model=mini`, or "default".
        presets: the chosen file of each group, e.g. {"model": "mini"}.
        title: the swept values of this point; empty outside a sweep.
        progress: whether the command says how far it is while it works; changes no result.
        last: whether no other point of the sweep follows.
    """

    config: C
    sources: dict[str, str]
    presets: dict[str, str]
    title: str
    progress: bool = True
    last: bool = True


def compose_runs(line: CommandLine, tokens: Sequence[str], sweep: bool = False) -> list[Run[Any]]:
    """`name=value` arguments -> the runs that they define, each with a checked config.

    Raises:
        WanError: an argument is not name=value, an option or preset is unknown, a value has the
            wrong type or is refused by the schema, an option is given twice, several values are
            given without `sweep`, or several points of a sweep would write the same file.
    """
    tokens = _name_words(tokens, line)
    _check_words(tokens, line)
    progress, tokens = _take_progress(tokens)
    tokens = [_one_spelling(token, line, sweep) for token in tokens]
    tokens, texts = _take_texts(tokens, line, sweep)
    overrides = [_parse(token, line) for token in tokens]
    _check_once([line_key(line, o.key_or_group) for o in overrides] + list(texts), line)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_FOLDER)):
        groups = preset_groups(line.config_name)
        runs = []
        for point in _points(overrides, line, sweep):
            title = ", ".join(f"{o.key_or_group}={v}" for o, v in point if o.is_sweep_override())
            run = _compose_run(line, point, groups, texts, title)
            runs.append(replace(run, progress=progress))
    _check_written(line, runs)
    return [replace(one, last=one is runs[-1]) for one in runs]


def _name_words(tokens: Sequence[str], line: CommandLine) -> list[str]:
    """The arguments with `name=` in front of the values that may stand alone.

    A path with = in it is no option: a slash comes before the =, or what comes before it is the
    name of no option and there is such a file.
    """
    names = iter(line.words)
    known = {*option_names(line.schema), *line.shortcuts, *preset_groups(line.config_name), *COMMON}
    named = []
    for token in tokens:
        before, equals, _ = token.partition("=")
        is_file = before.lstrip("+~") not in known and os.path.exists(token)
        alone = not equals or "/" in before or is_file
        name = next(names, None) if alone else None
        named.append(token if name is None else f"{name}={token}")
    return named


def _check_words(tokens: Sequence[str], line: CommandLine) -> None:
    """Refuse a word that is no option; most often it belongs to a text without quotes."""
    for number, token in enumerate(tokens):
        if "=" in token:
            continue
        advice = "options are written name=value; --help lists them"
        before = tokens[number - 1] if number else ""
        key, _, value = before.partition("=")
        if key in line.words:
            advice = f"one name too many; this command takes {len(line.words)}"
        elif key in (*line.text_keys, *line.text_lists, *line.path_keys, *line.list_keys):
            advice = f'put quotes around a text with spaces: {key}="{value} {token} ..."'
        raise WanError(f"{token!r}: {advice}")


def _take_progress(tokens: Sequence[str]) -> tuple[bool, list[str]]:
    """Separate `progress=`, which every command has: (its value, the other arguments).

    It is no setting: nothing that is made or kept depends on it.
    """
    given = [token for token in tokens if token.startswith("progress=")]
    if len(given) > 1:
        raise WanError("progress= is given twice")
    value = given[0].removeprefix("progress=") if given else "true"
    if value.lower() not in ("true", "false"):
        raise WanError(f"progress={value}: must be true or false")
    return value.lower() == "true", [token for token in tokens if token not in given]


def _one_spelling(token: str, line: CommandLine, sweep: bool) -> str:
    """An argument as the command's settings have it, where it is spelled as in another command.

    A preset's name stands for its checkpoint (checkpoint=mini), and a command without presets of
    models takes model= for checkpoint=. A single value of a list needs no brackets, nor do several.
    Several values of an option with a list of its own in `grid` go there.

    Raises:
        WanError: model= names no preset, in a command that has none.
    """
    key, equals, value = token.partition("=")
    kinds = {name: kind for name, kind, _ in walk_options(line.schema)}
    full, presets = line_key(line, key), preset_names("model")
    several = value.startswith("[") or ("," in value and not sweep)
    if key == "model" and "model" not in (*kinds, *preset_groups(line.config_name)):
        if "checkpoint" not in kinds:
            return token
        if value not in presets:
            raise WanError(
                f"model={value}: no such preset; choose one of {', '.join(presets)}, or give a "
                "folder or a hub id as checkpoint="
            )
        key = full = "checkpoint"
    if not equals or full not in kinds:
        return token
    if full.split(".")[-1] == "checkpoint":
        names = value.split(",") if sweep else [value]
        value = ",".join(
            preset_checkpoint(name) if name in presets and not Path(name).exists() else name
            for name in names
        )
    elif several and list_of(kinds[full]) is None and f"grid.{full}" in kinds:
        key = f"grid.{full}"
        value = in_brackets(value)
    elif list_of(kinds[full]) is not None and not (sweep and "," in value):
        literal = (*line.text_lists, *line.list_keys)
        value = value if full in literal else in_brackets(value)
    return f"{key}={value}"


def in_brackets(value: str) -> str:
    """A list as it is written, of one value or several; nothing and null stay what they are."""
    return value if value in ("", "null") or value.startswith("[") else f"[{value}]"


def _take_texts(
    tokens: Sequence[str], line: CommandLine, sweep: bool
) -> tuple[list[str], dict[str, Text]]:
    """Separate literal texts and paths: (arguments for Hydra, {option: value})."""
    known = {name: kind for name, kind, _ in walk_options(line.schema)}
    rest: list[str] = []
    texts: dict[str, Text] = {}
    for token in tokens:
        key, equals, value = token.partition("=")
        key = key.lstrip("+")
        is_list = key in line.list_keys
        is_path = (key in line.path_keys or is_list) and not (sweep and "," in value)
        is_one_of_texts = key in line.text_lists and not value.startswith("[")
        is_text = key in line.text_keys or is_one_of_texts
        if not equals or not (is_text or is_path) or key not in known:
            rest.append(token)
            continue
        if key in texts and not (is_list or is_one_of_texts):
            raise WanError(f"{key}= is given twice")
        check_text(key, value)
        if is_path and not value:
            raise WanError(f"{key}= is empty: name a file or a folder, or leave it out")
        if is_path and value == "null":
            if type(None) not in get_args(known[key]):
                raise WanError(f"{key}=null: must be {kind_in_words(known[key])}")
            texts[key] = None
        elif is_list or is_one_of_texts:
            entries = split_list(key, value) if is_list else [value]
            texts[key] = [*(texts.get(key) or []), *entries]
        else:
            texts[key] = value
    return rest, texts


def split_list(key: str, value: str) -> list[str]:
    """The entries of `a,b` or `[a,b]`; one that holds a comma stands in quotes.

    Raises:
        WanError: an entry is empty.
    """
    inside = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    quote = "'" if inside.lstrip().startswith("'") else '"'
    try:
        entries = next(csv.reader([inside], skipinitialspace=True, quotechar=quote), [])
    except csv.Error as error:
        raise WanError(f"{key}={value!r}: cannot be read as a list ({error})") from error
    entries = [entry.strip() for entry in entries]
    if not entries or not all(entries):
        raise WanError(f"{key}={value}: an entry is empty; write one file, or several as {key}=a,b")
    return entries


def _parse(token: str, line: CommandLine) -> Override:
    """Parse one argument with Hydra's grammar, or raise a WanError with the reason.

    Where a text is meant, what looks like a number stays as it was typed: 1e5 may be a commit.
    """
    key, _, value = token.partition("=")
    kinds = {name: kind for name, kind, _ in walk_options(line.schema)}
    is_text = takes_texts(kinds.get(line_key(line, key))) and not {"'", '"'} & set(value)
    quoted = LIKE_NUMBER.sub(r'\1"\2"', value) if is_text else value
    try:
        override = OverridesParser.create().parse_override(f"{key}={quoted}")
        override.input_line = token
    except HydraException as error:
        raise WanError(
            f"{key}=: cannot read {value!r}; put the value in quotes inside quotes if it is "
            f"a text: '{key}=\"...\"'"
        ) from error
    if "${" in value:
        raise WanError(f"{token}: ${{..}} stands for nothing here; write the value itself")
    if override.package is not None:
        raise WanError(f"{key}=: no option has an @ in its name; --help lists them")
    if override.type == OverrideType.DEL:
        raise WanError(f"{token}: options cannot be removed, only set")
    if override.key_or_group.startswith("hydra"):
        raise WanError(f"{token}: this command chooses its own output folders; see output_dir=")
    return override


def line_key(line: CommandLine, key: str) -> str:
    """The full name of an option, from its short or its full name."""
    return line.shortcuts[key].key if key in line.shortcuts else key


def _check_once(keys: list[str], line: CommandLine) -> None:
    """Refuse an option that is set twice, and two options that replace each other."""
    for key in keys:
        if keys.count(key) > 1:
            raise WanError(f"{short_key(line, key)}= is given twice")
    for shortcut in line.shortcuts.values():
        for other in shortcut.clears:
            if shortcut.key in keys and other in keys:
                both = f"{short_key(line, shortcut.key)}= and {short_key(line, other)}="
                raise WanError(f"{both} set the same thing: give only one of them")


def _points(
    overrides: list[Override], line: CommandLine, sweep: bool
) -> Iterator[list[tuple[Override, str]]]:
    """Yield every combination of the listed values, as (override, value as Hydra text)."""
    several = {n: item.metadata.get("several") for n, _, item in walk_options(line.schema)}
    values: list[list[str]] = []
    for override in overrides:
        if override.is_sweep_override():
            if not sweep:
                key = line_key(line, override.key_or_group)
                advice = several.get(key) or "add -m to run one after the other"
                raise WanError(f"{override.input_line}: one value only; {advice}")
            values.append(list(override.sweep_string_iterator()))
        else:
            values.append([override.get_value_element_as_str()])
    for combination in itertools.product(*values):
        yield list(zip(overrides, combination, strict=True))


def _check_written(line: CommandLine, runs: Sequence[Run[Any]]) -> None:
    """Refuse a sweep whose points would overwrite each other's file."""
    for key in line.written:
        files = [file for run in runs if (file := getattr(run.config, key)) is not None]
        if len(set(files)) < len(files):
            raise WanError(
                f"{key}={files[0]}: every point of the sweep would write it, one over the other; "
                f"run them one by one, each with its own {key}="
            )


def _compose_run(
    line: CommandLine,
    point: list[tuple[Override, str]],
    groups: Sequence[str],
    texts: dict[str, Text],
    title: str,
) -> Run[Any]:
    arguments: list[str] = []
    given = set(texts)
    clears = {s.key: s.clears for s in line.shortcuts.values()}
    kinds = {name: kind for name, kind, _ in walk_options(line.schema)}
    typed = {line_key(line, o.key_or_group): value for o, value in point}
    for override, value in point:
        key = line_key(line, override.key_or_group)
        if key in groups:
            _check_preset(key, value)
            arguments.append(f"{key}={value}")
            continue
        if key in line.list_keys or list_of(kinds.get(key)) is not None:
            value = in_brackets(value)
        arguments.append(f"++{key}={value}")  # ++: the schema decides which names exist
        arguments += [f"++{other}=null" for other in clears.get(key, ())]
        given |= {key, *clears.get(key, ())}
    try:
        cfg = compose(line.config_name, overrides=arguments, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        words = " ".join(f"{short_key(line, key)}={value}" for key, value in typed.items())
        raise WanError(
            f"{words}: cannot be set so; each option is one of those that --help lists, "
            "under its whole name"
        ) from error
    presets = {g: c for g, c in cfg.hydra.runtime.choices.items() if g in groups}
    cfg = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
    config = _read(line, groups, cfg, typed)
    config = _set_texts(config, texts)
    _check_needs(line, config, given)
    sources = _sources(line.schema, presets) | dict.fromkeys(given, "command line")
    return Run(config, sources, presets, title)


def _check_needs(line: CommandLine, config: Any, given: Collection[str]) -> None:
    """Refuse an option that nothing would read, because another one is given or is not.

    Raises:
        WanError: names both.
    """
    idle_by = config.idle() if isinstance(config, Options) else {}
    for name, _, item in walk_options(line.schema):
        needs = item.metadata.get("needs", ())
        value = reduce(getattr, name.split("."), config)
        if name in given and name in idle_by and value != default_of(item):
            raise WanError(
                f"{short_key(line, name)}={value} with {idle_by[name]}: nothing reads it"
            )
        idle = name in given and needs and value not in (None, False)
        if idle and not any(reduce(getattr, other.split("."), config) for other in needs):
            others = " or ".join(f"{short_key(line, other)}=" for other in needs)
            raise WanError(f"{short_key(line, name)}={value} without {others}: nothing reads it")


def _check_preset(group: str, name: str) -> None:
    known = preset_names(group)
    if name not in known:
        raise WanError(f"{group}={name}: no such preset; choose one of {', '.join(known)}")


def _read(
    line: CommandLine, groups: Sequence[str], cfg: DictConfig, typed: Mapping[str, str]
) -> Any:
    """`read_config`, with OmegaConf's errors reworded for users.

    Args:
        typed: the values of options as they were typed, by full name.
    """
    _check_kinds(line, cfg, typed)
    try:
        return read_config(line.schema, cfg)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        key = next((one for one in typed if one.startswith(f"{key}.")), key)
        known = [*option_names(line.schema), *line.shortcuts, *groups, *COMMON]
        raise WanError(f"unknown option {key}=; {_suggest(key, known)}") from error
    except OmegaConfBaseException as error:
        raise WanError(_wrong_kind(line, str(error.full_key or ""), typed)) from error


def _check_kinds(line: CommandLine, cfg: DictConfig, typed: Mapping[str, str]) -> None:
    """Refuse what OmegaConf would take though it is of another kind.

    Raises:
        WanError: a number other than 0 and 1 for true or false; a list or settings in a list.
    """
    for key, kind, _ in walk_options(line.schema):
        if key not in typed:
            continue
        value = OmegaConf.select(cfg, key)
        is_count = bool in (kind, *get_args(kind)) and type(value) is int and value not in (0, 1)
        is_list = list_of(kind) is not None and isinstance(value, ListConfig)
        if is_count or (is_list and not _is_nested_as(kind, value)):
            raise WanError(_wrong_kind(line, key, typed))


def _is_nested_as(kind: Any, value: Any) -> bool:
    """Whether a value holds lists as deep as its kind does."""
    inner = list_of(kind)
    if inner is None:
        return not isinstance(value, Container)
    return isinstance(value, ListConfig) and all(_is_nested_as(inner, one) for one in value)


def _wrong_kind(line: CommandLine, place: str, typed: Mapping[str, str]) -> str:
    """What is wrong with a value, from the kind of its option.

    Args:
        place: where the settings do not fit: an option, an entry of one, or a group.
    """
    kinds = {name: kind for name, kind, _ in walk_options(line.schema)}
    key = re.sub(r"\[.*", "", place)
    if key not in kinds and key not in typed:
        # Of a list in a list, OmegaConf names the number of the entry only.
        nested = [name for name in typed if list_of(list_of(kinds.get(name)))]
        key = next(iter(nested or (typed if len(typed) == 1 else ())), key)
    inside = [short_key(line, name) for name in kinds if name.startswith(f"{key}.")]
    value = typed.get(key)
    given = f"{short_key(line, key)}={'' if value is None else value}"
    if inside:
        return f"{given}: is a group of options; give one of them, such as {inside[0]}="
    if key not in kinds:
        return f"{given}: no option takes that; --help lists them"
    more = ""
    if list_of(kinds[key]) is None and (value or "").startswith("["):
        more = "; for several values, one after the other, add -m and write a,b"
    return f"{given}: must be {kind_in_words(kinds[key])}{more}"


def _suggest(key: str, known: Sequence[str]) -> str:
    if FOREIGN_NAMES.get(key, "").split("=")[0] in known:
        return f"here it is called {FOREIGN_NAMES[key]}="
    # Compare last parts too: `guidance` should find `sampler.guidance`.
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    close += [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    if close:
        return "did you mean " + " or ".join(f"{name}=" for name in dict.fromkeys(close)) + "?"
    return "--help lists all options"


def _set_texts(config: Any, texts: Mapping[str, Text]) -> Any:
    """Put literal texts into the (nested) dataclass; its own checks run again."""
    for key, value in texts.items():
        parent, _, rest = key.partition(".")
        if rest:
            value = _set_texts(getattr(config, parent), {rest: value})
        config = replace(config, **{parent: value})
    return config


def _sources(schema: type, presets: Mapping[str, str]) -> dict[str, str]:
    """Source of each option: "default" or the preset file that sets it, as `group=preset`.

    Files merge in the order of their groups, `model` last, so that its file wins.
    """
    sources = dict.fromkeys(option_names(schema), "default")
    for group, choice in sorted(presets.items(), key=lambda item: item[0] == "model"):
        for name in _names_in(group, choice):
            if name in sources:
                sources[name] = f"{group}={choice}"
    return sources


def _names_in(group: str, choice: str) -> Iterator[str]:
    """The options that a preset file sets, with those of the files that it builds on."""
    path = CONFIG_FOLDER / group / f"{choice}.yaml"
    prefix = "" if "@package _global_" in path.read_text(encoding="utf-8") else f"{group}."
    content = read_yaml(path)
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            yield from _names_in(group, base)
    for name in _leaves(content):
        yield prefix + name


def _leaves(tree: Mapping[Any, Any]) -> Iterator[str]:
    """Dotted names of all values in a tree of mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in _leaves(value))
        else:
            yield str(key)
