"""Training: a resumed run is the uninterrupted one, to the bit; checkpoints are whole or absent."""

import argparse
import itertools
import json
import lzma
import math
import re
import shutil

import pytest
import torch
from files import tensors_of
from safetensors.torch import load_file, save_file

from checkpoints import load_model, load_tokenizer, read_config
from checkpoints.families import native
from modeling import (
    GQAConfig,
    LayerConfig,
    ModelConfig,
    MTPConfig,
    RopeConfig,
    Transformer,
    generate,
)
from moe import ExpertChoice, MoEConfig, TopK, TopP
from moe.routing import LinearRouter
from tools import corpus, held_out, training_state
from tools import train as train_command
from tools.__main__ import main
from tools.make_tiny import CONFIGS, write_tiny
from tools.train import (
    add_arguments,
    learning_rate,
    make_optimizer,
    split_mtp_weight,
    train_step,
)

STORY = "Once there was a king, {i} years old, who had {i} sons and as many golden apples.\n\n"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    books = ["".join(STORY.format(i=10 * book + i) for i in range(40)) for book in range(4)]
    (folder / "text.txt").write_text("\n\n\n".join(books), encoding="utf-8")
    config = CONFIGS["deepseek_v3"] | {"vocab_size": 300, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(held_out, "NUM_PROMPTS", 2)


def train(paths, out: str, *flags: str, steps: int = 6) -> int:
    fixed = ["--text", paths / "text.txt", "--out", paths / out]
    fixed += [] if "--start-from" in flags else ["--config", paths / "config.json"]
    fixed += ["--steps", steps, "--batch-size", 2, "--sequence-length", 24, "--warm-up-steps", 2]
    fixed += ["--save-every", 2, "--hold-out", 1, "--learning-rate", 0.01]
    return main(["train", *map(str, fixed), *flags])


def assert_equal_to_the_bit(one, other):
    for name in ("weights.safetensors", "optimizer.safetensors"):
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        assert all(found[key].equal(tensor) for key, tensor in expected.items()), name


def log_of(path):
    """The lines of a run's log, without the times."""
    lines = (path / "log.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(paths, capsys):
    evaluated = ("--evaluate-every", "3")
    assert train(paths, "whole", "--decay-steps", "2", *evaluated) == 0
    assert train(paths, "halves", *evaluated, steps=4) == 0
    assert train(paths, "halves", "--decay-steps", "2", "--resume", *evaluated) == 0
    whole, halves = paths / "whole", paths / "halves"
    assert_equal_to_the_bit(whole / "step-6", halves / "step-6")
    assert len(log_of(whole)) == 6
    assert log_of(whole) == log_of(halves)


def test_evaluating_changes_no_weight_and_is_logged_where_it_was_done(paths):
    drawn = []
    for out, every in (("never evaluated", 0), ("evaluated", 2)):
        torch.manual_seed(3)
        assert train(paths, out, "--evaluate-every", str(every)) == 0
        drawn.append(torch.rand(4))
    plain, evaluated = paths / "never evaluated", paths / "evaluated"
    assert_equal_to_the_bit(plain / "step-6", evaluated / "step-6")
    assert drawn[0].equal(drawn[1])
    logged = {
        i: line.pop("held_out_bits_per_byte", None) for i, line in enumerate(log_of(evaluated))
    }
    assert [i for i, bits in logged.items() if bits] == [1, 3, 5]
    without = [line | {"held_out_bits_per_byte": 0} for line in log_of(plain)]
    assert [line | {"held_out_bits_per_byte": 0} for line in log_of(evaluated)] == without
    assert logged[5] == pytest.approx(bits_of_pieces(paths, evaluated, 24), abs=6e-5)


def bits_of_pieces(paths, run, length):
    """Bits per byte of the last document after step 6, in 16 pieces of so many tokens."""
    text = (paths / "text.txt").read_text().split("\n\n\n")[-1]
    tokens = load_tokenizer(run).encode(text)
    model = load_model(run / "model", dtype=torch.float32, progress=False)
    model.load_state_dict(load_file(run / "step-6" / "weights.safetensors"), strict=False)
    starts = list(range(0, len(tokens) - 1, length - 1))
    assert len(starts) > 16
    losses = []
    for number in range(16):
        piece = tokens[starts[number * len(starts) // 16] :][:length]
        logits_TV = model(torch.tensor([piece]))[0].log_softmax(dim=-1)
        losses += [-logits_TV[i, token].item() for i, token in enumerate(piece[1:])]
    bytes_per_token = len(text.encode()) / (len(tokens) - 1)
    return sum(losses) / len(losses) / math.log(2) / bytes_per_token


def test_an_estimate_of_a_short_text_is_its_measurement(tmp_path):
    model = Transformer(read_config(native_config(tmp_path / "config.json", PLAIN_ROUTER, mtp=1)))
    model.initialize(0.3, seed=0)
    for num_tokens in (4, 64, 65, 1009):
        tokens_N = torch.randint(300, (num_tokens,), generator=torch.Generator().manual_seed(1))
        expected = held_out.measure_without_overlap(model, tokens_N).bits_per_byte(700)
        assert held_out.estimate_bits_per_byte(model, tokens_N, 700, 64) == pytest.approx(expected)


def test_an_estimate_reads_16_pieces_and_leaves_the_model_as_it_was(tmp_path):
    model = Transformer(read_config(native_config(tmp_path / "config.json", PLAIN_ROUTER, mtp=1)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pieces, modes = [], []
    model.embed.register_forward_hook(lambda module, inputs, _: pieces.append(inputs[0]))
    model.embed.register_forward_hook(lambda module, *_: modes.append(module.training))
    held_out.estimate_bits_per_byte(model, torch.arange(299).repeat(10), 700, 24)
    assert len(pieces) == 16  # of 130
    steps = [(b[0, 0] - a[0, 0]).item() % 299 for a, b in itertools.pairwise(pieces)]
    assert set(steps) == {8 * 23, 9 * 23}
    assert modes == [False] * 16
    assert model.training
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


LINE = r"step (\d) of 6: loss \d\.\d{3}, [\d,]+ tokens a second, 00:0\d left(.*)"


def test_a_log_file_shows_life(paths, monkeypatch, capsys):
    assert train(paths, "quiet") == 0
    lines = [re.fullmatch(LINE, line).groups() for line in capsys.readouterr().err.splitlines()]
    assert lines == [("1", ""), ("6", "")]
    monkeypatch.setattr(train_command, "REPORT_SECONDS", 0)
    assert train(paths, "talking", "--evaluate-every", "4") == 0
    lines = [re.fullmatch(LINE, line).groups() for line in capsys.readouterr().err.splitlines()]
    bits = log_of(paths / "talking")[3]["held_out_bits_per_byte"]
    told = f", held-out {bits} bits per byte"
    assert lines == [(str(step), told if step >= 4 else "") for step in range(1, 7)]


def test_a_line_tells_speed_and_time_left_of_this_part_of_the_run():
    args = argparse.Namespace(steps=1000, batch_size=4, sequence_length=100)
    progress = train_command.Progress(200, args)
    told = progress.describe({"step": 299, "loss": 1.23456}, 50.0)  # 100 steps in 50 seconds
    assert told == "step 300 of 1,000: loss 1.235, 800 tokens a second, 05:50 left"


def test_sequences_longer_than_the_model_are_refused_before_anything_is_written(paths, capsys):
    assert train(paths, "long", "--sequence-length", "65") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --sequence-length 65: the model has 64 positions; give at most")
    assert error.count("\n") == 1
    assert not (paths / "long").exists()
    assert train(paths, "longest", "--sequence-length", "64", steps=1) == 0


def test_the_report_and_the_written_model_are_complete(paths, capsys):
    train(paths, "reported")
    report = json.loads(capsys.readouterr().out)
    assert report["held_out_bits_per_byte"] > 0
    assert report["expert_load"].keys() == {"1", "2", "3"}
    assert report["drafted"] > 0
    model = load_model(paths / "reported" / "model", progress=False)
    assert model.embed.weight.dtype == torch.bfloat16
    assert len(model.mtp) == 1
    assert load_tokenizer(paths / "reported" / "model").vocab_size == 300


def test_learning_reduces_the_loss_and_every_router_is_balanced(paths):
    train(paths, "learning", steps=30)
    log = [json.loads(line) for line in (paths / "learning" / "log.jsonl").open()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert log[-1]["mtp_loss"] < 0.8 * log[0]["mtp_loss"]
    weights = load_file(paths / "learning" / "step-30" / "weights.safetensors")
    biases = {name: t for name, t in weights.items() if name.endswith("selection_bias")}
    assert len(biases) == 3  # two sparse layers and the MTP module
    assert all(bias.abs().max() > 0 for bias in biases.values())


@pytest.fixture(scope="module")
def base(paths):
    """A trained model with one module, and a config of the same with two."""
    assert train(paths, "base", steps=30) == 0
    config = json.loads((paths / "config.json").read_text())
    (paths / "two.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    return paths / "base" / "model"


def test_modules_can_be_trained_on_a_model_that_stays_as_it_is(paths, base, capsys):
    more = ("--start-from", base, "--config", paths / "two.json", "--only-mtp")
    assert train(paths, "modules", *map(str, more), "--mtp-weight", "0.3", "0.2", steps=30) == 0
    assert "tensors of MTP modules are new" in capsys.readouterr().err
    before, after = tensors_of(base), tensors_of(paths / "modules" / "model")
    last = len(load_model(base, progress=False).layers)
    modules = tuple(f"model.layers.{number}." for number in (last, last + 1))
    main = [name for name in before if not name.startswith(modules)]
    assert all(after[name].equal(before[name]) for name in main)
    assert all(after[name].dtype == before[name].dtype for name in main)
    rest = [name for name in after if name not in main and "embed" not in name]
    assert {name.split(".")[2] for name in rest} == {str(last), str(last + 1)}
    for name in rest:
        if name in before and "shared_head.head" not in name:
            assert not after[name].equal(before[name]), name
    biases = [name for name in rest if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(after[name].any() for name in biases)
    log = [json.loads(line) for line in (paths / "modules" / "log.jsonl").open()]
    assert log[-1]["mtp_loss"] < 0.8 * log[0]["mtp_loss"]
    assert load_tokenizer(paths / "modules" / "model").vocab_size == 300


def test_going_on_from_a_model_trains_all_of_it(paths, base):
    assert train(paths, "further", "--start-from", str(base)) == 0
    first, before = tensors_of(paths / "further" / "model"), tensors_of(base)
    assert first.keys() == before.keys()
    assert not any(first[name].equal(before[name]) for name in first if "proj" in name)
    log = [json.loads(line) for line in (paths / "further" / "log.jsonl").open()]
    begun = [json.loads(line) for line in (paths / "base" / "log.jsonl").open()]
    assert log[0]["loss"] < 0.8 * begun[0]["loss"]


def test_a_run_knows_what_it_began_with_by_its_contents(paths, base, tmp_path, capsys):
    start = shutil.copytree(base, tmp_path / "start")
    text = (paths / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text)

    def resume(text_file, *flags):
        capsys.readouterr()
        more = ("--start-from", str(tmp_path / "start"), "--text", str(tmp_path / text_file))
        return train(paths, "moved", *more, *flags, steps=2), capsys.readouterr().err

    assert resume("text.txt")[0] == 0
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress(text.encode()))
    config = json.loads((start / "config.json").read_text())
    (tmp_path / "same.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    start.rename(tmp_path / "elsewhere")
    moved = ("--start-from", str(tmp_path / "elsewhere"), "--config", str(tmp_path / "same.json"))
    assert resume("text.txt.xz", *moved, "--resume")[0] == 0

    def refused(changed, *flags):
        code, error = resume(*flags, "--resume")
        assert code == 2
        assert error.count("\n") == 1
        assert error.startswith(f"error: {paths / 'moved' / 'step-2'}: made {changed}, by the SHA")
        assert "give what the run began with, or begin another run in another --out" in error

    (tmp_path / "text.txt").write_text(text.replace("apples", "nuts"))
    refused("with other contents of --text", "text.txt", *moved)
    (tmp_path / "same.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    refused("with other contents of --config", "text.txt.xz", *moved)
    tensors = load_file(tmp_path / "elsewhere" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "elsewhere" / "model.safetensors")
    refused("with other contents of --start-from", "text.txt.xz", *moved[:2])


def test_another_tokenizer_is_noticed(paths, capsys):
    """By its tokens, when a run is resumed; a run that begins again trains its own."""
    assert train(paths, "tokens", steps=2) == 0
    model = paths / "tokens" / "tokenizer.model"
    own, other = model.read_bytes(), corpus.train_vocabulary("other words " * 50, 270)
    model.write_bytes(other)
    capsys.readouterr()
    assert train(paths, "tokens", "--resume", steps=4) == 2
    assert "step-2: the tokenizer gives other tokens than before" in capsys.readouterr().err
    shutil.rmtree(paths / "tokens" / "step-2")
    assert train(paths, "tokens", steps=2) == 0
    assert model.read_bytes() == own


def test_weights_to_start_from_are_not_those_of_a_run_without(paths, base, capsys):
    assert train(paths, "from nothing", steps=2) == 0
    more = ("--start-from", str(base), "--config", str(paths / "config.json"), "--resume")
    assert train(paths, "from nothing", *more, steps=4) == 2
    assert "step-2: made without --start-from, by the SHA-256" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_is_refused_by_name(paths, capsys):
    assert train(paths, "old", steps=2) == 0
    old = paths / "old" / "step-2" / "training.json"
    written = json.loads(old.read_text())
    del written["contents"]
    written["settings"] |= {"text": str(paths / "text.txt"), "config": str(paths / "config.json")}
    old.write_text(json.dumps(written))
    capsys.readouterr()
    assert train(paths, "old", "--resume", steps=4) == 2
    error = capsys.readouterr().err
    assert "step-2: its training.json lacks the hashes of text, config and weights" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [(), ("--only-mtp",)])
def test_a_model_whose_head_is_its_embedding_trains_too(paths, base, tmp_path, flags):
    tied = tmp_path / "tied"
    write_tiny("deepseek_v3", tied, tie_word_embeddings=True)
    out = f"tied{len(flags)}"
    more = ("--start-from", str(tied), *flags)
    assert train(paths, out, *more, steps=2) == 0
    assert train(paths, out, *more, "--resume", steps=4) == 0
    model = load_model(paths / out / "model", progress=False)
    assert model.head.weight is model.embed.weight
    before = load_model(tied, progress=False)
    assert model.embed.weight.equal(before.embed.weight) == bool(flags)


def test_modules_of_a_model_without_any_are_refused(paths, tmp_path, capsys):
    write_tiny("deepseek_v3", tmp_path / "none", num_nextn_predict_layers=0)
    more = ("--start-from", str(tmp_path / "none"), "--only-mtp")
    assert train(paths, "none", *more) == 2
    assert "there are no MTP modules" in capsys.readouterr().err
    assert not (paths / "none").exists()


def native_config(path, *routers, mtp=0):
    """A file in our own format: a small model whose layers have these routers."""
    attention = GQAConfig(num_heads=2, kv_heads=1, head_width=4, rope=RopeConfig(width=4))
    kinds = [MoEConfig(router=router, expert_width=8) for router in routers]
    layers = tuple(LayerConfig(attention=attention, feed_forward=kind) for kind in kinds)
    config = ModelConfig(
        vocab_size=300, d_model=16, layers=layers, max_length=64, mtp=MTPConfig(blocks=layers[:mtp])
    )
    path.write_text(json.dumps(native.write_config(config)))
    return path


PLAIN_ROUTER = TopK(num_experts=4, top_k=2, scoring="softmax")


@pytest.mark.parametrize(
    ("router", "generates"),
    [
        (TopP(num_experts=5, mass=0.6, max_experts=3), True),
        (ExpertChoice(num_experts=5, capacity=1.5), False),
    ],
)
def test_routers_with_empty_slots_train(paths, tmp_path, capsys, router, generates):
    path = native_config(tmp_path / "config.json", PLAIN_ROUTER, router, mtp=1)
    out = f"empty slots {type(router).__name__}"
    assert train(paths, out, "--config", str(path)) == 0
    report = json.loads(capsys.readouterr().out)
    assert math.isfinite(report["held_out_bits_per_byte"])
    assert ("draft_acceptance" in report) == generates
    model = load_model(paths / out / "model", progress=False)
    assert model.layers[1].feed_forward.config.router == router
    if not generates:
        with pytest.raises(
            ValueError, match="layers.1.feed_forward.router routes each token by all"
        ):
            list(generate(model, [1, 2], 3))


class RouterWithTemperature(LinearRouter):
    """What a researcher's first change looks like: one more parameter."""

    def __init__(self, d_model, config, biased):
        super().__init__(d_model, config, biased)
        self.temperature = torch.nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, std=0.02):
        super().reset_parameters(std)
        if hasattr(self, "temperature"):
            torch.nn.init.ones_(self.temperature)

    def forward(self, x_ND):
        return super().forward(x_ND * self.temperature)


def test_a_new_parameter_is_refused_before_the_first_step_and_trained_in_our_format(
    paths, monkeypatch, capsys
):
    def build(self, d_model):
        return RouterWithTemperature(d_model, self, self.selection_bias)

    monkeypatch.setattr(TopK, "build", build)
    assert train(paths, "as published") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no rule of the family maps layers.1.feed_forward.router.temperature, layers.2" in error
    assert 'to="abacus"' in error
    assert not list((paths / "as published").glob("step-*"))
    assert not (paths / "as published" / "log.jsonl").exists()
    assert train(paths, "in our format", "--to", "abacus") == 0
    model = load_model(paths / "in our format" / "model", dtype=torch.float32, progress=False)
    temperature = model.layers[1].feed_forward.router.temperature
    assert temperature.item() != 1  # trained


def test_a_short_held_out_text_is_enough(paths, tmp_path, capsys):
    (tmp_path / "text.txt").write_text((paths / "text.txt").read_text() + "\n\n\nOnce upon a time")
    assert train(paths, "short", "--text", str(tmp_path / "text.txt"), steps=1) == 0
    assert json.loads(capsys.readouterr().out)["held_out_bits_per_byte"] > 0
    (tmp_path / "text.txt").write_text((paths / "text.txt").read_text() + "\n\n\n")
    assert train(paths, "empty", "--text", str(tmp_path / "text.txt"), steps=1) == 2
    assert "too few to measure" in capsys.readouterr().err


def test_no_module_is_asked_for_a_token_of_another_document(base):
    """The figure in the log, computed from logits position by position."""
    model = load_model(base, dtype=torch.float32, progress=False).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(300, (2, 24), generator=generator)
    documents_BT = torch.tensor([[0] * 5 + [1] * 2 + [2] * 17, [3] * 24])
    (logits_BtV,) = model.mtp_logits(tokens_BT)
    losses = [
        -logits_BtV[b, i].log_softmax(dim=-1)[tokens_BT[b, i + 2]].item()
        for b in range(2)
        for i in range(22)
        if documents_BT[b, i] == documents_BT[b, i + 2]
    ]
    assert len(losses) == 3 + 0 + 15 + 22
    args = parsed("--mtp-weight", "1")
    figures = train_step(model, make_optimizer(model, 0.1), tokens_BT, documents_BT, 0, args)
    assert figures["mtp_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--text", "-", "--out", "-", "--steps", "1", *flags])


@pytest.mark.parametrize(
    ("given", "weights"),
    [((), [0.15, 0.15]), (("0.4",), [0.2, 0.2]), (("0.4", "0.1"), [0.4, 0.1])],
)
def test_one_weight_is_shared_by_the_depths_and_several_are_one_each(given, weights):
    args = parsed(*(("--mtp-weight", *given) if given else ()))
    assert split_mtp_weight(args, 2) == weights


def test_documents_are_packed_as_the_text_is(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(corpus.train_vocabulary(STORY * 9, 300))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    documents = [STORY.format(i=i).strip() * i for i in (3, 1, 2)]
    tokenizer, text = load_tokenizer(tmp_path), corpus.DOCUMENT_END.join(documents)
    tokens_N, documents_N = corpus.pack_documents(tokenizer, text)
    assert tokens_N.tolist() == tokenizer.encode(text)
    for number, document in enumerate(documents):
        own = tokens_N[documents_N == number].tolist()
        assert tokenizer.decode(own).strip() == document


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--only-mtp",), "--only-mtp needs --start-from"),
        (("--mtp-weight", "0.1", "0.2"), "2 numbers for 1 MTP modules"),
        (("--mtp-weight", "-1"), "--mtp-weight"),
        (("--start-from", "nowhere"), "nowhere"),
        (("--start-from", "OTHER"), "differs from --config"),
    ],
)
def test_wrong_settings_of_modules_are_one_line(paths, base, tmp_path, capsys, flags, told):
    if "OTHER" in flags:
        config = json.loads((paths / "config.json").read_text())
        (tmp_path / "other.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        flags = ("--start-from", str(base), "--config", str(tmp_path / "other.json"))
    assert train(paths, "never", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


def test_bfloat16_trains_too(paths):
    assert train(paths, "bfloat16", "--precision", "bfloat16", steps=2) == 0


def test_an_interrupted_save_leaves_the_last_good_checkpoint(paths, monkeypatch, capsys):
    train(paths, "cut", steps=2)
    before = (paths / "cut" / "step-2" / "weights.safetensors").read_bytes()
    really_save = training_state.save_file

    def interrupted(tensors, path):
        really_save(tensors, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_state, "save_file", interrupted)
    assert train(paths, "cut", "--resume", steps=4) == 130
    monkeypatch.undo()
    assert (paths / "cut" / "step-2" / "weights.safetensors").read_bytes() == before
    assert not (paths / "cut" / "step-4").exists()
    assert train(paths, "cut", "--resume", steps=4) == 0
    assert (paths / "cut" / "step-4").exists()
    assert len((paths / "cut" / "log.jsonl").read_text().splitlines()) == 4


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(paths, capsys):
    train(paths, "kept", "--decay-steps", "3", steps=4)
    shutil.rmtree(paths / "kept" / "step-4")  # as if stopped in the middle of its fall
    wrong = {
        "--resume": (),
        "--seed": ("--resume", "--decay-steps", "3", "--seed", "5"),
        "--decay-steps": ("--resume", "--decay-steps", "2"),
    }
    for named, flags in wrong.items():
        capsys.readouterr()
        assert train(paths, "kept", *flags, steps=4) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1


def test_a_finished_run_can_be_lengthened(paths, capsys):
    train(paths, "longer", "--decay-steps", "2", steps=4)
    assert train(paths, "longer", "--decay-steps", "2", "--resume", steps=6) == 0
    log = [json.loads(line) for line in (paths / "longer" / "log.jsonl").open()]
    rates = [line["learning_rate"] for line in log]
    assert rates == pytest.approx([0.005, 0.01, 0.02 / 3, 0.01 / 3, 0.02 / 3, 0.01 / 3])
    assert train(paths, "longer", "--decay-steps", "2", "--resume", steps=5) == 2
    assert "step-6: its step is larger than --steps 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--decay-steps", "99"),
        ("--learning-rate", "-1"),
        ("--learning-rate", "nan"),
        ("--mtp-share", "0"),
        ("--hold-out", "9"),
        ("--evaluate-every", "-1"),
        ("--batch-size", "100000"),
        ("--device", "abacus"),
        ("--text", "nowhere.txt"),
        ("--config", "nowhere.json"),
    ],
)
def test_a_wrong_setting_is_one_line(paths, capsys, flag, value):
    assert train(paths, "wrong" + flag + value, flag, value) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_every_epoch_tiles_the_text_and_no_step_repeats_another():
    per_epoch = (1000 - 16) // 16 // 4
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [corpus.choose_batch(1000, step, 4, 16, seed=1) for step in steps]
        seen = torch.cat(batches).flatten()
        assert len(seen.unique()) == len(seen)
        assert all((b[:, 1:] - b[:, :-1] == 1).all() for b in batches)


def test_held_out_documents_are_the_last_ones():
    text = "a\n\n\nb\n\n\nc"
    assert corpus.hold_out(text, 2) == ("a", "b\n\n\nc")
    with pytest.raises(ValueError, match="has 3 documents"):
        corpus.hold_out(text, 3)


def test_the_vocabulary_spells_any_text(paths):
    (paths / "tokenizer.model").write_bytes(corpus.train_vocabulary(STORY * 9, 300))
    tokenizer = load_tokenizer(paths)
    for text in ("Once there  was\n\n\n a king.", " \t5 €\U0001f9da\u200dx"):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_the_learning_rate_warms_up_stays_and_falls():
    class Settings:
        steps, warm_up_steps, decay_steps, learning_rate = 10, 2, 4, 1.0

    rates = [learning_rate(Settings, step) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
