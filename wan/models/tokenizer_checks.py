"""What the steps of a tokenizer.json may do, checked before the tokenizers library runs them."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.errors import WanError
from wan.models.spiece import check_charsmap

# What the tokenizer.json of a UMT5 may do to a text before its model cuts it into pieces. None of
# it makes a text much longer, and no regular expression comes from the file.
NORMALIZERS = ("Precompiled", "Strip", "Replace", "NFC", "NFKC", "Nmt", "Lowercase")
PRE_TOKENIZERS = ("Metaspace", "WhitespaceSplit")
SPACES = {"Regex": " {2,}"}  # the one pattern that such files replace
MAX_STEPS = 8


def check_steps(values: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer.json that is no UMT5's, or could turn a prompt into endless work.

    Raises:
        WanError: its model is no Unigram model, or a step before it is of another kind.
    """
    model = values.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "Unigram":
        raise WanError(f"its model is {kind!r}, a UMT5 tokenizer is a Unigram model")
    for name, known in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        for step in _steps(name, values.get(name)):
            if step.get("type") not in known:
                what, allowed = ascii(step.get("type"))[:80], ", ".join(known)
                raise WanError(f"a {name} of type {what}; a UMT5 tokenizer has {allowed}")
            if step["type"] == "Replace":
                pattern, content = step.get("pattern"), step.get("content")
                if pattern not in (SPACES, {"String": " "}) or content not in ("▁", " "):
                    raise WanError(
                        f"a {name} that replaces {ascii(pattern)[:80]}; only spaces are replaced, "
                        "by one character"
                    )
            if step["type"] == "Precompiled":
                check_charsmap(_decoded(step.get("precompiled_charsmap")), path)


def _steps(name: str, entry: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre_tokenizer: those of a sequence, or the only one."""
    if entry is None:
        return []
    found: Any = [entry]
    if isinstance(entry, dict) and entry.get("type") == "Sequence":
        found = entry.get(f"{name}s", entry.get("pretokenizers"))
    if (
        not isinstance(found, list)
        or len(found) > MAX_STEPS
        or not all(isinstance(step, dict) for step in found)
    ):
        raise WanError(f"its {name} must be one step, or a sequence of at most {MAX_STEPS}")
    return found


def _decoded(charsmap: Any) -> bytes:
    try:
        return base64.b64decode(charsmap or "", validate=True)
    except (ValueError, TypeError) as error:
        raise WanError(f"its precompiled_charsmap is not base64 ({error})") from error
