"""Prompt text to token ids, from either of the two tokenizer files of a release.

A release ships the same SentencePiece unigram model twice: `spiece.model`, and `tokenizer.json` for
the tokenizers library. Both give the same ids here; `tokenizer_json_from_spiece` makes the second
from the first.

Layout of the ids: <pad> 0, </s> 1, <s> 2 (never produced), <unk> 3, then the pieces, then sentinels
<extra_id_N> from the last id downwards. Text ends with </s>; nothing is put in front.
"""

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ftfy
import sentencepiece
import tokenizers
from ftfy.fixes import unescape_html

from wan.errors import WanError, errors_about
from wan.files import parse_json, read_bytes, read_json
from wan.models.spiece import MAX_SPIECE_BYTES, charsmap_of, check_charsmap
from wan.models.tokenizer_checks import check_steps
from wan.settings import check_length, is_of

PAD, EOS, BOS, UNK = SPECIALS = ("<pad>", "</s>", "<s>", "<unk>")
PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)
MAX_TOKENIZER_BYTES = 64 << 20  # the tokenizer.json of UMT5 has 17 MB
MAX_ESCAPES = 32
MAX_SENTINELS = 10_000  # <extra_id_N>; UMT5 has 300


def clean_prompt(text: str) -> str:
    """Text as the released pipelines feed it to the tokenizer.

    ftfy repairs mojibake, straightens quotes, folds full-width forms and unescapes HTML; doubly
    escaped HTML is unescaped again; runs of white space become one space. This changes token ids,
    so it is part of the model's input format.

    Raises:
        WanError: it is longer than `wan.settings.MAX_PROMPT`, or escaped too often, see
            `check_escapes`.
    """
    check_length("a prompt", text)
    check_escapes(text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def strip_prompt(text: str) -> str:
    """Text as FastVideo feeds it to the tokenizer: without white space at its ends.

    Raises:
        WanError: it is longer than `wan.settings.MAX_PROMPT`.
    """
    check_length("a prompt", text)
    return text.strip()


def check_escapes(text: str) -> None:
    """Refuse HTML that is escaped more than `MAX_ESCAPES` times, such as &amp;amp;amp;...

    ftfy takes one level off at a time, and reads the whole text for each.

    Raises:
        WanError: it is escaped more often.
    """
    if text.isascii() and text.count(";") <= MAX_ESCAPES:  # a level has a semicolon of its own
        return
    for _ in range(MAX_ESCAPES):
        before, text = text, ftfy.fix_text(unescape_html(text), unescape_html=False)
        if text == before:
            return
    raise WanError(
        f"a prompt has HTML that is escaped more than {MAX_ESCAPES} times, such as "
        "&amp;amp;amp;...; write the characters that are meant"
    )


@dataclass(frozen=True)
class TokenizedPrompt:
    """Ids of one prompt, </s> included, and whether the prompt was cut."""

    ids: list[int]
    num_tokens_before_truncation: int

    @property
    def truncated(self) -> bool:
        """Whether the end of the prompt was dropped."""
        return self.num_tokens_before_truncation > len(self.ids)


class Tokenizer:
    """Text -> token ids. `from_folder` builds it from either file, with that file's library."""

    def __init__(self, encode: Callable[[str], list[int]], vocab_size: int) -> None:
        """Take the function from text to ids without </s>, and the number of ids in use."""
        self._encode = encode
        self.vocab_size = vocab_size
        self.source: Path | None = None  # the folder or file it was read from

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read a released `tokenizer/` folder: `tokenizer.json`, or else `spiece.model`.

        Raises:
            WanError: neither file is there, or a file is damaged or breaks the layout of the ids.
        """
        folder = Path(path)
        if (folder / "tokenizer.json").is_file():
            tokenizer = cls._from_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "spiece.model").is_file():
            path = folder / "spiece.model"
            spiece = read_bytes(path, MAX_SPIECE_BYTES)
            tokenizer = cls.from_spiece(spiece, _num_sentinels(folder), path)
        else:
            raise WanError(f"{folder}: no tokenizer.json and no spiece.model in this folder")
        tokenizer.source = folder
        return tokenizer

    @classmethod
    def _from_tokenizer_json(cls, path: Path) -> "Tokenizer":
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
        values = parse_json(content, str(path))
        with errors_about(str(path)):
            check_steps(values, path)
        try:
            model = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as error:
            _raise_if_stopped(error)
            raise WanError(
                f"{path}: tokenizers {tokenizers.__version__} can't read it ({error}); download it "
                "again, or install the version of tokenizers that wrote it"
            ) from error
        model.no_truncation()
        model.no_padding()
        _check_specials(path, [model.token_to_id(piece) for piece in SPECIALS])
        return cls(partial(_encode_tokens, model), model.get_vocab_size())

    @classmethod
    def from_spiece(cls, spiece: bytes, num_sentinels: int, path: Path) -> "Tokenizer":
        """Take a SentencePiece model.

        Args:
            spiece: the bytes of a spiece.model.
            num_sentinels: how many <extra_id_N> follow its pieces.
            path: where they were read, for messages.

        Raises:
            WanError: it is damaged, or breaks the layout of the ids.
        """
        check_charsmap(charsmap_of(spiece, path), path)
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(spiece)
        except (RuntimeError, OSError) as error:
            raise WanError(f"{path}: not a SentencePiece model ({error})") from error
        _check_specials(path, [model.PieceToId(piece) for piece in SPECIALS])
        vocab_size = model.GetPieceSize() + num_sentinels
        added = {piece: index for index, piece in enumerate(SPECIALS)}
        added |= {f"<extra_id_{n}>": vocab_size - 1 - n for n in range(num_sentinels)}
        # SentencePiece splits a literal "</s>" into letters; tokenizer.json maps it to the token.
        marker = re.compile("(" + "|".join(map(re.escape, added)) + ")")
        return cls(partial(_encode_pieces, model, added, marker), vocab_size)

    def __call__(self, text: str, max_length: int = 512) -> TokenizedPrompt:
        """Tokenise one prompt, already cleaned; a longer one keeps max_length - 1 ids and </s>."""
        if max_length < 1:
            raise WanError(f"max_length={max_length}: at least 1 is needed, for the final </s>")
        ids = self._encode(text)
        return TokenizedPrompt([*ids[: max_length - 1], EOS_ID], len(ids) + 1)


# Functions of the module, and not of a call, so that a tokenizer can be pickled.


def _encode_tokens(model: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return model.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        _raise_if_stopped(error)
        raise WanError(f"the tokenizer fails at {text[:80]!r} ({error})") from error


def _encode_pieces(
    model: Any, added: Mapping[str, int], marker: re.Pattern[str], text: str
) -> list[int]:
    ids: list[int] = []
    for part in marker.split(text):
        ids += [added[part]] if part in added else model.EncodeAsIds(part)
    return ids


def _raise_if_stopped(error: BaseException) -> None:
    """Let Ctrl-C through; a panic of the tokenizers library is neither, and no Exception."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error


def _check_specials(path: Path, found: list[int | None]) -> None:
    if found != [PAD_ID, EOS_ID, BOS_ID, UNK_ID]:
        raise WanError(
            f"{path}: {', '.join(SPECIALS)} have ids {found}, a UMT5 tokenizer has 0, 1, 2, 3 "
            "(T5's own tokenizer is a different one)"
        )


def _num_sentinels(folder: Path) -> int:
    """Number of <extra_id_N> tokens: not in spiece.model, so tokenizer_config.json gives it."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise WanError(
            f"{path} is missing: spiece.model alone does not say how many sentinels follow"
        )
    config = read_json(path)
    number, listed = config.get("extra_ids"), config.get("additional_special_tokens", [])
    if not isinstance(listed, list):
        raise WanError(f"{path}: additional_special_tokens must be a list")
    if number is not None:
        if not is_of(int, number) or not 0 <= number <= MAX_SENTINELS:
            raise WanError(f"{path}: extra_ids={number!r} must be from 0 to {MAX_SENTINELS}")
        return int(number)
    return sum(str(token).startswith("<extra_id_") for token in listed)
