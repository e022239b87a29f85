"""train.text_encoder: the captions it draws, what it writes, and that a resumed run is the same."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from test_world import vocabulary
from torch import nn

from configs.cli import execute
from configs.command_line import CommandLine
from configs.export import ExportConfig
from configs.training import LoopConfig, TextEncoderTrainConfig
from train.kept import export_kept
from train.optim import make_optimizers
from train.state import TrainState
from train.text_encoder.run import (
    CLASSES,
    IGNORED,
    MORE_WORDS,
    Example,
    Heads,
    disturb,
    draw_examples,
    empty_example,
    fit_probe,
    initialize,
    label_hits,
    label_losses,
    make_tokenizer,
    make_train_step,
    measure_gates,
    object_of,
    pad_ids,
    passed,
    pooled_states,
    token_labels,
    train_spiece,
    train_text_encoder,
)
from wan.errors import WanError
from wan.miniature.captions import BACKGROUND_WORDS, COLOUR_WORDS, SIZE_WORDS
from wan.models.tokenizer import Tokenizer
from wan.models.tokenizer_export import write_tokenizer_folder
from wan.models.umt5 import UMT5Config, UMT5Encoder, encode_text
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import list_files
from wan.weights.hub import STUDENT
from wan.weights.load import load_module

NAMES = list(CLASSES)


def tiny_config(folder, **loop) -> TextEncoderTrainConfig:
    return TextEncoderTrainConfig(
        output_dir=str(folder),
        vocab_size=200,
        tokenizer_captions=600,
        encoder={"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        batch_size=16,
        warmup=2,
        probe_captions=40,
        loop=LoopConfig(**{"steps": 6, "log_every": 1, "save_every": 3} | loop),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which a tiny model has been trained for six steps."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(WanError, match="misses a gate"):
        train_text_encoder(tiny_config(folder))
    return folder


# What is written ---------------------------------------------------------------------------------


def test_the_folders_load_in_transformers_and_give_our_context(run):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "tokenizer")
    reference = transformers.UMT5EncoderModel.from_pretrained(run / "text_encoder")
    config = json.loads((run / "text_encoder" / "config.json").read_text())
    encoder = load_module(
        lambda: UMT5Encoder(UMT5Config.from_json(config)),
        open_checkpoint(run / "text_encoder"),
        "text_encoder",
    )
    for prompt in ("", "a small red circle moving right", "Snow ☃ & 'quotes'!"):
        with torch.no_grad():
            expected = reference(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
            ours = encode_text(encoder, Tokenizer.from_folder(run / "tokenizer"), [prompt], 64)[0]
        torch.testing.assert_close(ours[: len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_the_report_holds_the_gates(run):
    report = json.loads((run / "text_encoder_report.json").read_text())
    assert report["passed"] is False
    assert 0 <= report["binding_token"] <= report["attributes_token"] < 0.9
    assert report["output_mean_square"] == pytest.approx(1, abs=1e-3)


def test_a_checkpoint_gives_the_encoder_of_the_end(run, tmp_path):
    export_kept(ExportConfig(str(run), output=str(tmp_path / "encoder")))
    files = list_files(run / "text_encoder")
    assert all((tmp_path / "encoder" / n).read_bytes() == p.read_bytes() for n, p in files.items())
    with pytest.raises(WanError, match="keeps no averages"):
        export_kept(ExportConfig(str(run), weights="ema", output=str(tmp_path / "x")))


def test_six_steps_equal_three_and_three(run, tmp_path):
    """A run that lost its last checkpoint repeats it bit for bit."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-0000006")
    with pytest.raises(WanError, match="misses a gate"):
        train_text_encoder(tiny_config(again))
    for name in ("checkpoints/step-0000006/state.safetensors", "text_encoder/model.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, path.open()) if "loss" in line]
        for path in (run / "metrics.jsonl", again / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [0, 1, 2, 3, 4, 5]


def test_a_tokenizer_of_other_settings_is_not_taken_for_the_one_asked_for(tmp_path):
    folder, config = tmp_path / "tokenizer", tiny_config(tmp_path)
    size = make_tokenizer(config, folder).vocab_size
    other = replace(config, vocab_size=150)
    with pytest.raises(WanError, match=r"'vocab_size': 200\}, now .* 'vocab_size': 150\}"):
        make_tokenizer(other, folder)
    for loop in (config.loop, LoopConfig(allow_changes=True)):
        kept = make_tokenizer(replace(config if loop is config.loop else other, loop=loop), folder)
        assert kept.vocab_size == size


def test_a_step_without_a_hidden_word_trains_the_labels():
    tokenizer = Tokenizer.from_folder(STUDENT / "tokenizer")
    encoder = UMT5Encoder(
        UMT5Config(tokenizer.vocab_size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    both = nn.ModuleDict({"encoder": encoder, "heads": Heads(encoder.config)})
    state = TrainState({"both": both}, make_optimizers(both, "adamw", 1e-3), step=969)
    config = TextEncoderTrainConfig(batch_size=16)
    values = make_train_step(encoder, both["heads"], tokenizer, config)(state)
    assert values["word_loss"] == 0  # no word is hidden in this very step
    assert values["loss"] == values["label_loss"] > 0
    assert all(weight.isfinite().all() for weight in both.parameters())


def test_the_loss_falls(run):
    losses = [json.loads(line).get("label_loss") for line in (run / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] - 0.03  # six small steps, two of them warm-up


@pytest.mark.parametrize("option", ["batch_size=1", "optimizer=sgd", "loop.steps=0", "lr=0"])
def test_bad_settings_end_with_one_line(option, capsys):
    line = CommandLine(TextEncoderTrainConfig, "text_encoder")
    assert execute(lambda run: 0, line, "", [option]) == 2
    assert capsys.readouterr().err.startswith("error: " + option.split("=")[0])


def test_the_command_has_the_encoder_of_its_yaml():
    seen = []
    line = CommandLine(TextEncoderTrainConfig, "text_encoder")
    assert execute(lambda run: seen.append(run.config), line, "", ["loop.steps=7"]) == 0
    assert seen[0].loop.steps == 7
    UMT5Encoder(UMT5Config(vocab_size=10, **seen[0].encoder))


# Captions ----------------------------------------------------------------------------------------


def test_a_stream_of_examples_is_a_function_of_its_name():
    one, again = (draw_examples(0, "a", 20, 0.5) for _ in range(2))
    assert one == again
    assert one != draw_examples(0, "b", 20, 0.5)
    assert one != draw_examples(1, "a", 20, 0.5)


def test_shares_of_two_objects():
    count = NAMES.index("count")
    for share, expected in ((0.0, {0}), (1.0, {1}), (0.5, {0, 1})):
        examples = draw_examples(0, "x", 40, 0.5, two_objects=share)
        assert {labels[count] for example in examples for labels in example.labels} == expected
        assert {len(example.labels) - 1 for example in examples} == expected


@pytest.mark.parametrize(
    ("name", "table"),
    [("colour", COLOUR_WORDS), ("size", SIZE_WORDS), ("background", BACKGROUND_WORDS)],
)
def test_disturbed_captions_still_state_their_labels(name, table):
    """Whatever is replaced, dropped or shuffled, an attribute is said if its label says so."""
    others = [w for words in table.values() for w in words]
    others += [o for w in others for o in MORE_WORDS.get(w, ())]
    for example in draw_examples(0, "disturbed", 600, 1.0, two_objects=0.0):
        label = CLASSES[name][example.labels[0][NAMES.index(name)]]
        said = table.get(label, ())
        said = {*said, *(o for w in said for o in MORE_WORDS.get(w, ()))}
        found = set(example.text.lower().replace(".", " ").replace(",", " ").split()) & set(others)
        assert found <= said, example
        assert bool(found) == (label in table), example


def test_disturbing_changes_most_captions_and_keeps_the_order_of_two_objects():
    rng = random.Random(0)
    text = "a red circle and a blue star on a gray background"
    changed = [disturb(text, rng, free_order=False) for _ in range(200)]
    assert sum(c != text for c in changed) > 100
    reds = {"red", "crimson", "scarlet"}
    for words in (c.lower().split() for c in changed):
        first = min(i for i, w in enumerate(words) if w in reds)
        assert first < words.index("circle") < words.index("and") < words.index("star")


def test_an_empty_example_states_nothing():
    rng = random.Random(0)
    examples = [empty_example(rng) for _ in range(30)]
    assert any(not example.text for example in examples)
    words = {w for example in examples for w in example.text.split()}
    content = {w for table in (COLOUR_WORDS, SIZE_WORDS) for ws in table.values() for w in ws}
    assert not words & content
    for name, label in zip(NAMES, *examples[0].labels, strict=True):
        assert label == IGNORED if name == "count" else CLASSES[name][label] == "unspecified"


def test_the_tokenizer_knows_the_worlds_words_and_all_of_ascii(tmp_path):
    texts = [example.text for example in draw_examples(0, "tokenizer", 3000, 0.7)]
    write_tokenizer_folder(train_spiece(texts, 320), tmp_path, 1)
    tokenizer = Tokenizer.from_folder(tmp_path)
    pieces = [len(tokenizer(word).ids) - 1 for word in vocabulary()]
    assert sum(n == 1 for n in pieces) > 0.75 * len(pieces)
    printable = "".join(map(chr, range(32, 127)))
    assert 3 not in tokenizer(printable).ids
    assert tokenizer("A RED Circle").ids == tokenizer("a red circle").ids


# Labels and probes -------------------------------------------------------------------------------


def perfect_logits(labels):
    parts = [
        torch.nn.functional.one_hot(column.clamp(min=0), len(classes)).float() * 50
        for column, classes in zip(labels.unbind(-1), CLASSES.values(), strict=True)
    ]
    return torch.cat(parts, dim=-1)


def some_labels(count=64):
    return torch.tensor([example.labels[0] for example in draw_examples(0, "labels", count, 0.0)])


def test_a_token_has_the_labels_of_the_object_that_it_is_about():
    tokenizer = Tokenizer.from_folder(STUDENT / "tokenizer")
    one = tuple(range(len(NAMES)))
    other = tuple(reversed(one))
    examples = [
        Example("a red circle and a BLUE star", (one, other)),
        Example("a red circle", (one,)),
        Example("", (other,)),
    ]
    words = len(tokenizer("a red circle").ids) - 1
    whole = len(tokenizer(examples[0].text).ids)
    number = torch.tensor([object_of(tokenizer, example, whole) for example in examples])
    assert number[0].tolist() == [0] * words + [-1] + [1] * words + [-1]
    assert number[1].tolist() == [0] * (words + 1) + [-1] * (whole - words - 1)
    assert number[2].tolist() == [0] + [-1] * (whole - 1)
    labels = token_labels(number, examples)
    assert labels[0, 0].tolist() == list(one)
    assert labels[0, words + 1].tolist() == list(other)
    assert labels[2, 0].tolist() == list(other)
    for position in (words, -1):  # "and", the end: the scene's labels, no object's
        known = [i for i, label in enumerate(labels[0, position].tolist()) if label != IGNORED]
        assert [NAMES[i] for i in known] == ["count", "background"]


def test_a_gate_reads_one_object_of_each_caption():
    tokenizer = Tokenizer.from_folder(STUDENT / "tokenizer")
    examples = draw_examples(0, "binding", 6, 0.0, two_objects=1.0)
    torch.manual_seed(0)
    encoder = UMT5Encoder(
        UMT5Config(tokenizer.vocab_size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for pooling in ("mean", "token"):
        vectors, labels = pooled_states(encoder, tokenizer, examples, pooling)
        assert vectors.shape == (6, 16)
        assert labels.tolist() == [list(e.labels[row % 2]) for row, e in enumerate(examples)]
    first = tokenizer(examples[0].text).ids
    states = encoder(torch.tensor([first]), torch.ones(1, len(first), dtype=torch.bool))[0]
    torch.testing.assert_close(vectors[0], states[0], rtol=1e-4, atol=1e-4)


def test_losses_and_hits_of_perfect_and_of_wrong_logits():
    labels = some_labels()
    logits = perfect_logits(labels)
    assert label_hits(logits, labels).all()
    assert label_losses(logits, labels).max() < 1e-4
    wrong = labels.clone()
    wrong[:, 3] = (wrong[:, 3] + 1) % len(CLASSES[NAMES[3]])
    hits = label_hits(logits, wrong)
    assert not hits[:, 3].any()
    assert hits[:, :3].all()
    assert label_losses(logits, wrong)[3] > 10
    wrong[:, 3] = IGNORED
    assert label_hits(logits, wrong).all()


def test_a_probe_reads_what_is_there_and_nothing_else():
    labels = some_labels(400)
    code = perfect_logits(labels) / 50
    vectors = code @ torch.randn(code.shape[1], 60, generator=torch.Generator().manual_seed(0))
    probe = fit_probe(vectors[:300], labels[:300], steps=100)
    assert label_hits(probe(vectors[300:]), labels[300:]).float().mean() > 0.97
    noise = torch.randn(400, 60, generator=torch.Generator().manual_seed(0))
    probe = fit_probe(noise[:300], labels[:300], steps=100)
    assert label_hits(probe(noise[300:]), labels[300:]).float().mean() < 0.7


def test_gates_ask_for_both_numbers_in_both_poolings():
    names = [f"{n}_{p}" for n in ("attributes", "binding", "disturbed") for p in ("mean", "token")]
    good = dict.fromkeys(names, 1.0)
    assert passed(good)
    for name in names:
        assert passed(good | {name: 0.98}) == name.startswith("disturbed")


def test_an_untrained_encoder_misses_the_gates(run):
    torch.manual_seed(0)
    config = tiny_config(run)
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    encoder = UMT5Encoder(UMT5Config(vocab_size=tokenizer.vocab_size, **config.encoder))
    initialize(encoder)
    measured = measure_gates(encoder, tokenizer, config)
    assert measured["binding_mean"] < 0.5


def test_padding():
    ids, mask = pad_ids([[5, 1], [1], [7, 8, 1]])
    assert ids.tolist() == [[5, 1, 0], [1, 0, 0], [7, 8, 1]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_initialised_scores_are_of_order_one_and_heads_look_different_ways():
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    encoder = UMT5Encoder(config)
    initialize(encoder)
    attention = encoder.blocks[0].attention
    x = torch.randn(500, 64)
    q, k = (p(x).unflatten(-1, (4, 16))[:, 0] for p in (attention.query, attention.key))
    assert 0.5 < (q @ k.T).std().item() < 2
    bias = attention.relative_bias.weight
    assert bias[3].tolist() != bias[3 + 16].tolist()  # three tokens before and after differ
    assert len({tuple(column) for column in bias.T.tolist()}) == 4
    assert Heads(config).words.out_features == 50
