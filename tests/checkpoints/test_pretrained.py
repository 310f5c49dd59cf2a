"""The model that ships: complete, small, balanced, and the same one for transformers."""

import pytest
import torch
from files import SHIPPED, TALE
from published import relative_difference, reload

from checkpoints import load_model, load_tokenizer
from modeling import MLAConfig, generate
from moe import MoEConfig, expert_load, record_routing


@pytest.fixture(scope="module")
def model():
    return load_model(SHIPPED, dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.tensor([load_tokenizer(SHIPPED).encode(TALE.replace("\n", " "))])


def test_it_has_the_shape_it_claims(model):
    first, *rest = model.config.layers
    assert not isinstance(first.feed_forward, MoEConfig)
    for layer in (*rest, *model.config.mtp.blocks):
        assert isinstance(layer.attention, MLAConfig)
        assert layer.feed_forward.router.scoring == "sigmoid"
        assert layer.feed_forward.router.selection_bias
        assert layer.feed_forward.router.num_experts >= 16
        assert layer.feed_forward.router.top_k >= 2
        assert layer.feed_forward.shared_width == layer.feed_forward.expert_width
    assert len(model.config.mtp.blocks) == 1
    assert load_tokenizer(SHIPPED).vocab_size == model.config.vocab_size == 4096


def test_it_takes_at_most_24_megabytes():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) <= 24_000_000


@torch.no_grad()
def test_transformers_loads_the_same_folder_and_gives_the_same_logits(model, tokens_BT):
    peer, info = reload(SHIPPED)
    assert not info["missing_keys"]
    assert all(name.startswith("model.layers.4.") for name in info["unexpected_keys"])
    assert relative_difference(model(tokens_BT), peer(tokens_BT).logits) < 1e-4


@torch.no_grad()
def test_it_knows_english_and_no_expert_is_idle(model, tokens_BT):
    with record_routing(model) as routings:
        logits_BTV = model(tokens_BT)
    nats = torch.nn.functional.cross_entropy(logits_BTV[0, :-1], tokens_BT[0, 1:])
    bits = nats * (tokens_BT.shape[1] - 1) / torch.tensor(2.0).log() / len(TALE.encode())
    assert bits < 1.9
    loads_E = torch.stack([expert_load(routing) for routing in routings.values()])
    assert loads_E.max() < 4
    assert loads_E.min() > 0


def test_more_than_two_in_five_drafts_are_accepted_and_change_no_word(model, tokens_BT):
    prompt = tokens_BT[0, :40].tolist()
    plain = list(generate(model, prompt, 60))
    drafted = generate(model, prompt, 60, draft_tokens=1)
    assert list(drafted) == plain
    statistics = drafted.statistics
    assert sum(statistics.accepted) > 0.4 * sum(statistics.drafted)


def test_its_vocabulary_spells_every_byte():
    tokenizer = load_tokenizer(SHIPPED)
    for text in ("Once  upon\na time.\n\n\n", "\u4e2d\u6587 \U0001f409 \x01"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
