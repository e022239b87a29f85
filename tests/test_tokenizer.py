"""Tokenizer: both file formats, transformers' own reading of them, and prompt cleaning."""

import base64
import html
import io
import json
import random
import shutil
import time
from functools import partial

import ftfy
import pytest
import sentencepiece
import transformers

from wan.errors import WanError
from wan.models.tokenizer import (
    Tokenizer,
    _encode_tokens,
    clean_prompt,
    strip_prompt,
)
from wan.models.tokenizer_export import tokenizer_json_from_spiece, write_tokenizer_folder
from wan.settings import MAX_PROMPT

NUM_SENTINELS = 5
TEXTS = [
    "a small red circle moving right on a gray background",
    "A Red  Square,   and: a BLUE star!",
    "  leading and trailing   ",
    "",
    " ",
    "tab\tand\nnewline",
    "full width ＡＢＣ１２３，。",
    "ligature ﬁne, ½, №, ™, naïve café, e\u0301",
    "一个红色的圆 движение 🙂🙂 ok",
    "unknown ☃ between",
    "quotes “curly” ‘single’ — dash… {braces} [x] $HOME a=b",
    "literal </s> and <extra_id_0>, <pad><unk> x<extra_id_4>y <extra_id_9>",
    "▁already spaced▁",
    "x" * 300,
]


def train_spiece(**options) -> bytes:
    rng = random.Random(0)
    words = ["a", "one", "the", "red", "green", "blue", "small", "large", "circle", "square"]
    words += ["moving", "left", "right", "up", "and", "on"]
    sentences = [" ".join(rng.choices(words, k=9)) for _ in range(400)]
    sentences += ["The quick brown fox, jumps: over (13) lazy dogs! café"] * 3
    out = io.BytesIO()
    settings = {
        "model_type": "unigram",
        "vocab_size": 90,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "normalization_rule_name": "nmt_nfkc",
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=out, **(settings | options)
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_folder(train_spiece(), path, NUM_SENTINELS)
    return path


@pytest.fixture(scope="module")
def spiece_only(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("spiece")
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(folder / name, path)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_both_files_and_transformers_give_the_same_ids(folder, spiece_only, text):
    from_json = Tokenizer.from_folder(folder)(text)
    assert from_json == Tokenizer.from_folder(spiece_only)(text)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert from_json.ids == reference(text).input_ids


def test_transformers_pads_and_cuts_the_folder_as_the_pipelines_ask(folder):
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a red circle", "", "one blue square and the red circle moving left"]
    batch = reference(
        texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    assert set(batch) == {"input_ids", "attention_mask"}
    tokenizer = Tokenizer.from_folder(folder)
    for text, ids, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        expected = tokenizer(text, 12).ids
        assert ids.tolist() == expected + [0] * (12 - len(expected))
        assert mask.sum() == len(expected)


def test_both_files_give_the_same_ids_for_noise(folder, spiece_only):
    rng = random.Random(1)
    alphabet = "ab reds  cirl,.é★中 \t<>/s_▁"
    one, other = Tokenizer.from_folder(folder), Tokenizer.from_folder(spiece_only)
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        assert one(text) == other(text), text


@pytest.mark.parametrize("rule", ["nmt_nfkc_cf", "identity"])
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_other_models_convert_too(tmp_path, rule, byte_fallback):
    options = {"normalization_rule_name": rule, "byte_fallback": byte_fallback, "vocab_size": 340}
    write_tokenizer_folder(train_spiece(**options), tmp_path / "a", 0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    one, other = Tokenizer.from_folder(tmp_path / "a"), Tokenizer.from_folder(tmp_path / "b")
    for text in ["A Red circle", "ÉTÉ ☃ moving", "12 (13)!"]:
        assert one(text) == other(text)
    assert (3 in one("snow ☃").ids) is not byte_fallback


def test_layout_of_the_ids(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer("").ids == [1]
    assert tokenizer("☃").ids[-2:] == [3, 1]
    last = tokenizer.vocab_size - 1
    assert tokenizer("<extra_id_0>").ids == [last, 1]
    assert tokenizer("<extra_id_4>").ids == [last - 4, 1]


def test_truncation_keeps_the_end_token_and_is_reported(folder):
    tokenizer = Tokenizer.from_folder(folder)
    whole = tokenizer("a red circle and a blue square", 512)
    n = whole.num_tokens_before_truncation
    assert (len(whole.ids), whole.truncated) == (n, False)
    assert tokenizer("a red circle and a blue square", n) == whole
    cut = tokenizer("a red circle and a blue square", n - 1)
    assert cut.ids == [*whole.ids[: n - 2], 1]
    assert (cut.num_tokens_before_truncation, cut.truncated) == (n, True)
    with pytest.raises(WanError, match="max_length=0"):
        tokenizer("a", 0)


def test_specials_elsewhere_are_refused_in_both_formats(folder, tmp_path):
    (tmp_path / "spiece.model").write_bytes(train_spiece(unk_id=2, bos_id=3))
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(WanError, match="T5's own tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(WanError, match="T5's own tokenizer"):
        tokenizer_json_from_spiece(tmp_path / "spiece.model", 0)


def test_damaged_files_are_refused(folder, tmp_path):
    with pytest.raises(WanError, match=r"no tokenizer\.json and no spiece\.model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:900])
    with pytest.raises(WanError, match="not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(WanError, match="'BPE'"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(WanError, match=r"tokenizer\.json: tokenizers \d+\.\S+ can't read it"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes()[:1000])
    with pytest.raises(WanError, match="tokenizer_config"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(WanError, match="not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(WanError, match="not a SentencePiece model"):
        tokenizer_json_from_spiece(tmp_path / "spiece.model", 0)


def charsmap(replacement: bytes) -> dict:
    """A normalisation step whose table holds one text."""
    table = (1024).to_bytes(4, "little") + bytes(1024) + replacement + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def replace_step(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("name", "steps", "words"),
    [
        ("normalizer", [replace_step({"String": " "}, "x" * 99)], "only spaces are replaced"),
        ("normalizer", [replace_step({"String": "a"}, "aa")] * 8, "only spaces are replaced"),
        ("normalizer", [replace_step({"Regex": "(a+)+$"}, " ")], "only spaces are replaced"),
        ("normalizer", [charsmap(b"x" * 65)], "replaces a character by 65 bytes"),
        ("normalizer", [{"type": "Precompiled", "precompiled_charsmap": "\u2603"}], "not base64"),
        ("normalizer", [{"type": "Prepend", "prepend": "x"}], "type 'Prepend'"),
        ("normalizer", [{"type": "NFKC"}] * 9, "at most 8"),
        ("normalizer", [["NFKC"]], "one step, or a sequence"),
        (
            "pre_tokenizer",
            [{"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}],
            "type 'Split'",
        ),
    ],
)
def test_steps_that_could_make_endless_work_are_refused(folder, tmp_path, name, steps, words):
    """A downloaded file must not decide how long a prompt grows, or run its own expressions."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values[name] = {"type": "Sequence", f"{name}s": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(WanError, match=words):
        Tokenizer.from_folder(tmp_path)


def test_a_sentencepiece_model_with_a_long_replacement_is_refused(folder, tmp_path):
    def field(number: int, value: bytes) -> bytes:
        return bytes([number * 8 + 2, 128 | len(value) & 127, len(value) >> 7]) + value

    table = (1024).to_bytes(4, "little") + bytes(1024) + b"x" * 200 + b"\0"
    spiece = (folder / "spiece.model").read_bytes() + field(3, field(2, table))
    with pytest.raises(WanError, match="replaces a character by 200 bytes"):
        Tokenizer.from_spiece(spiece, 5, tmp_path)


@pytest.mark.parametrize("values", [{"extra_ids": 10**9}, {"extra_ids": "5"}, {"extra_ids": -1}])
def test_a_number_of_sentinels_is_checked(folder, tmp_path, values):
    shutil.copy(folder / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(WanError, match="extra_ids="):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_table_never_stops_the_library(folder, tmp_path, seed):
    """The library reads the table without checks, and panics at a prompt that leads outside."""
    values = json.loads((folder / "tokenizer.json").read_text())
    (step,) = (s for s in values["normalizer"]["normalizers"] if s["type"] == "Precompiled")
    table = bytearray(base64.b64decode(step["precompiled_charsmap"]))
    pick = random.Random(seed)
    for _ in range(pick.choice((1, 3, 300, 3000))):
        table[pick.randrange(4, len(table))] ^= 1 << pick.randrange(8)
    step["precompiled_charsmap"] = base64.b64encode(table).decode()
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    try:
        tokenizer = Tokenizer.from_folder(tmp_path)
    except WanError:
        return
    tokenizer("".join(map(chr, range(32, 0xD000, 7))))  # what is accepted never fails later


class PanicException(BaseException):
    """A panic of a library in Rust, which an `except Exception` lets through."""


@pytest.mark.parametrize(
    ("raised", "seen"), [(PanicException, WanError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_panic_of_the_library_is_one_error_and_ctrl_c_stays(raised, seen):
    class Fails:
        def encode(self, *_: object, **__: object) -> None:
            raise raised("index out of bounds")

    tokenizer = Tokenizer(partial(_encode_tokens, Fails()), 10)
    with pytest.raises(seen, match="index out of bounds"):
        tokenizer("a red circle")


def test_bpe_models_are_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(train_spiece(model_type="bpe"))
    with pytest.raises(WanError, match="model type 2"):
        tokenizer_json_from_spiece(tmp_path / "spiece.model", 0)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a \n\t b  ", "a b"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("Ｆｕｌｌ，ｗｉｄｔｈ", "Full,width"),
        ("schÃ¶n", "schön"),
        ("ﬁne", "fine"),
        ("e\u0301te\u0301", "été"),
        ("a\r\nb", "a b"),
        ("", ""),
    ],
)
def test_clean_prompt(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_clean_prompt_equals_the_pipelines():
    wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    for text in [*TEXTS, "“a” &amp;amp; b", "Ｆｕｌｌ"]:
        assert clean_prompt(text) == wan.prompt_clean(text)


# --- texts that would take for ever ---------------------------------------------------------------

ESCAPED = {
    "amp": "&" + "amp;" * 20_000,
    "numbers": "&" + "#38;#x26;AMP;" * 7_000,
    "full-width": "＆" + "amp;" * 20_000,
    "mojibake": "ï¼†" + "amp;" * 20_000,
    "through a control character": "&am&#1;p;" + "am&#1;p;" * 10_000,
    "inside each other": "&#" * 10_000 + "5" + "3;" * 10_000,
}


@pytest.mark.parametrize("name", ESCAPED)
def test_html_that_is_escaped_without_end_is_refused_in_no_time(name):
    started = time.perf_counter()
    with pytest.raises(WanError, match="escaped more than 32 times"):
        clean_prompt(ESCAPED[name])
    assert time.perf_counter() - started < 10  # minutes, one level at a time


@pytest.mark.parametrize(
    "text",
    [
        "&" + "amp;" * 30,
        "<b>" + "&" + "amp;" * 30,
        "&amp;amp;lt; " * 2_000,
        "&amp; and &#38;lt; and ＆amp;quot;\n<i>&amp;amp;</i>; &hellip;" * 50,
        "Ã© and â€™, &Acirc;\x80\x99; &#x1F600; &NotAnEntity; a&not b" * 50,
        "猫；&amp;amp;" * 100,
    ],
)
def test_other_html_is_cleaned_as_by_the_original_code(text):
    expected = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean_prompt(text) == " ".join(expected.split())


@pytest.mark.parametrize("clean", [clean_prompt, strip_prompt])
def test_a_prompt_has_a_length(clean):
    assert len(clean("ab " * (MAX_PROMPT // 3))) == MAX_PROMPT // 3 * 3 - 1
    with pytest.raises(WanError, match="a prompt has 100,001 characters: at most 100,000"):
        clean("a" * (MAX_PROMPT + 1))
