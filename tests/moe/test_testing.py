"""The test kit catches planted bugs, one in each toy part, and finds none in any part there is.

A toy reads like the papers and is right; every bug is one method of it, overridden.

Shapes: N tokens, D model width, E experts, K slots of a token, B batch, T positions.
"""

from itertools import pairwise

import pytest
import torch
from outside import CosineRouterConfig, SquaredConfig
from torch import nn
from toys import ToyConfig, ToyLayer

from moe import (
    Clamp,
    DenseConfig,
    ExpertChoice,
    Experts,
    MoEConfig,
    Routing,
    TopK,
    TopP,
    exact_products,
    experts_grouped,
)
from moe.testing import (
    check_experts,
    check_feed_forward,
    check_router,
    close,
    noise,
    random_routing,
    randomize,
    tiny_moe,
    watch_names,
)

# --- routers


class ToyRouter(nn.Module):
    """Two of five experts by biased sigmoids, weighed by the unbiased ones."""

    num_experts = 5

    def __init__(self, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, d_model))
        self.register_buffer("selection_bias", torch.zeros(5))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x_ND):
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with exact_products(x_ND.device.type):
            return x_ND.to(wide) @ self.weight.to(wide).T

    def choose(self, scores_NE):
        return (scores_NE + self.selection_bias).topk(2, dim=-1).indices

    def weigh(self, scores_NE, experts_NK):
        return scores_NE.gather(1, experts_NK)

    def forward(self, x_ND):
        logits_NE = self.logits(x_ND)
        scores_NE = torch.sigmoid(logits_NE)
        experts_NK = self.choose(scores_NE)
        weights_NK = self.weigh(scores_NE, experts_NK)
        return self.finish(Routing(weights_NK, experts_NK, scores_NE, logits_NE))

    def finish(self, routing):
        return routing


class NoBias(ToyRouter):
    def __init__(self, d_model):
        super().__init__(d_model)
        del self.selection_bias


class OtherCount(ToyRouter):
    num_experts = 6


class Tuple(ToyRouter):
    def finish(self, routing):
        return routing.weights_NK, routing.experts_NK


class Narrow(ToyRouter):
    def finish(self, routing):
        weights_NK = routing.weights_NK.bfloat16()
        return Routing(weights_NK, routing.experts_NK, routing.scores_NE, routing.logits_NE)


class Int32(ToyRouter):
    def finish(self, routing):
        experts_NK = routing.experts_NK.int()
        return Routing(routing.weights_NK, experts_NK, routing.scores_NE, routing.logits_NE)


class ScoresOfChosen(ToyRouter):
    def finish(self, routing):
        return Routing(*[routing.weights_NK, routing.experts_NK] * 2)


class Crowded(ToyRouter):
    """Fails where there is no token."""

    def finish(self, routing):
        routing.weights_NK.amax()
        return routing


class Twice(ToyRouter):
    def choose(self, scores_NE):
        return super().choose(scores_NE)[:, :1].expand(-1, 2)


class Outside(ToyRouter):
    def choose(self, scores_NE):
        return super().choose(scores_NE) - 1

    def weigh(self, scores_NE, experts_NK):
        return scores_NE.gather(1, experts_NK.clamp(min=0))


class WeightedEmpty(ToyRouter):
    def finish(self, routing):
        experts_NK = routing.experts_NK.masked_fill(routing.weights_NK < 0.3, 5)
        return Routing(routing.weights_NK, experts_NK, routing.scores_NE, routing.logits_NE)


class Divided(ToyRouter):
    """Divides by the weights of experts beyond a threshold, of which there may be none."""

    def weigh(self, scores_NE, experts_NK):
        weights_NK = super().weigh(scores_NE, experts_NK)
        return weights_NK / (weights_NK * (weights_NK > 0.5)).sum(dim=-1, keepdim=True)


class Centred(ToyRouter):
    """Looks at the other tokens and does not say so."""

    def logits(self, x_ND):
        return super().logits(x_ND - x_ND.mean(dim=0))


class Ordered(ToyRouter):
    """The first token is special."""

    sees_other_tokens = True

    def logits(self, x_ND):
        logits_NE = super().logits(x_ND)
        first_N1 = torch.arange(len(x_ND))[:, None] == 0
        return torch.where(first_N1, -logits_NE, logits_NE)


class Reduced(ToyRouter):
    def logits(self, x_ND):
        return (x_ND @ self.weight.T).to(torch.promote_types(x_ND.dtype, torch.float32))


class BiasedWeights(ToyRouter):
    def weigh(self, scores_NE, experts_NK):
        return super().weigh(scores_NE + self.selection_bias, experts_NK)


class ReversedBias(ToyRouter):
    def choose(self, scores_NE):
        return (scores_NE - self.selection_bias).topk(2, dim=-1).indices


class IgnoredBias(ToyRouter):
    def choose(self, scores_NE):
        return scores_NE.topk(2, dim=-1).indices


class PlainBias(ToyRouter):
    """The bias is no buffer, so no file would hold it."""

    def __init__(self, d_model):
        super().__init__(d_model)
        del self.selection_bias
        self.selection_bias = torch.zeros(5)


class TrainedBias(ToyRouter):
    """The optimizer would move it, too."""

    def __init__(self, d_model):
        super().__init__(d_model)
        del self.selection_bias
        self.selection_bias = nn.Parameter(torch.zeros(5))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.selection_bias)


class Random(ToyRouter):
    def logits(self, x_ND):
        return super().logits(x_ND) + torch.rand(len(x_ND), 5)


class Detached(ToyRouter):
    def weigh(self, scores_NE, experts_NK):
        return super().weigh(scores_NE, experts_NK).detach() * scores_NE.sum(1, keepdim=True)


class Unused(ToyRouter):
    def __init__(self, d_model):
        self.unused = None
        super().__init__(d_model)
        self.unused = nn.Parameter(torch.zeros(3))

    def reset_parameters(self):
        super().reset_parameters()
        if self.unused is not None:
            nn.init.zeros_(self.unused)


class Forgetful(ToyRouter):
    def reset_parameters(self):
        pass


class ReadsValues(ToyRouter):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.largest = float(self.weight.detach().max())


class LostTensor(ToyRouter):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.shift = torch.randn(5)

    def logits(self, x_ND):
        return super().logits(x_ND) + self.shift.to(x_ND.device)


class Hidden(ToyRouter):
    """Keeps a tensor in a list, which nothing saves."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.shifts = [torch.randn(5)]

    def logits(self, x_ND):
        return super().logits(x_ND) + self.shifts[0].to(x_ND.device)


class LeakInSoftmax(ToyRouter):
    """A bias that is equal for all experts drops out of a softmax."""

    def weigh(self, scores_NE, experts_NK):
        return (scores_NE + self.selection_bias).gather(1, experts_NK).softmax(dim=-1)


class DetachedScores(ToyRouter):
    def finish(self, routing):
        scores_NE = routing.scores_NE.detach()
        return Routing(routing.weights_NK, routing.experts_NK, scores_NE, routing.logits_NE)


class AveragedScores(ToyRouter):
    def finish(self, routing):
        scores_NE = routing.scores_NE.mean(dim=0, keepdim=True).expand_as(routing.scores_NE)
        scores_NE = scores_NE if len(routing.scores_NE) else routing.scores_NE
        return Routing(routing.weights_NK, routing.experts_NK, scores_NE, routing.logits_NE)


class ScoresOfOthers(ToyRouter):
    def finish(self, routing):
        scores_NE = 1 - routing.scores_NE
        return Routing(routing.weights_NK, routing.experts_NK, scores_NE, routing.logits_NE)


class Overflowing(ToyRouter):
    def logits(self, x_ND):
        logits_NE = super().logits(x_ND)
        powers_NE = logits_NE.exp()
        return powers_NE / powers_NE.sum(dim=-1, keepdim=True)


class ThreeExperts(ToyRouter):
    def choose(self, scores_NE):
        return (scores_NE + self.selection_bias).topk(3, dim=-1).indices


class WrongQuantizable(ToyRouter):
    quantizable = ("weights",)


class WrongName(ToyRouter):
    def weigh(self, scores_NE, experts_NK):
        weights_NE = super().weigh(scores_NE, experts_NK)
        return weights_NE * 1


class InnerRouter(ToyRouter):
    """The logits come from a linear layer, whose weight is read."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.inner = nn.Linear(d_model, d_model, bias=False)

    def logits(self, x_ND):
        with exact_products(x_ND.device.type):
            return super().logits(x_ND @ self.inner.weight.to(x_ND.dtype).T)


ROUTER_BUGS = {
    NoBias: "no num_experts or no selection_bias",
    OtherCount: "num_experts is 6, in the config 5",
    Tuple: "returns a tuple",
    Narrow: "expected float32 at least",
    Int32: "expected float32 at least and int64",
    ScoresOfChosen: r"scores_NE of 0 tokens .* shape \(0, 2\)",
    Twice: "has an expert twice",
    Outside: "outside 0 to 5",
    WeightedEmpty: "empty slot .* has a weight other than 0",
    Divided: "are not all finite",
    Centred: "a token's routing depends on other tokens",
    Ordered: "depends on the order of the tokens",
    Reduced: "autocast changes the routing",
    BiasedWeights: "selection_bias takes part in weights",
    ReversedBias: "loses tokens when its selection_bias rises",
    IgnoredBias: "selection_bias changes no choice",
    PlainBias: "keeps selection_bias in no file",
    TrainedBias: "selection_bias is no buffer",
    Random: "autocast changes|depends on the order|differs from the first",
    Detached: "the gradient of input 0 is wrong",
    Unused: "no gradient reaches unused",
    Forgetful: "does not set weight",
    ReadsValues: "cannot be built on the meta device",
    LostTensor: "keeps shift in no file",
    Hidden: "a copy loaded from the state_dict differs",
    LeakInSoftmax: "selection_bias takes part in weights",
    DetachedScores: "the gradient of input 0 is wrong",
    AveragedScores: "routing depends on",
    ScoresOfOthers: "scores of chosen experts are lower",
    Overflowing: "300 times as large",
    ThreeExperts: "a token uses 3 experts, and experts_per_token is 2",
    WrongQuantizable: "quantizable of it, a WrongQuantizable, names no tensor: weights",
    WrongName: "names do not tell shapes .*weights_NE: E = 2, but 5",
    InnerRouter: "inner is read and not called",
}


def test_the_toy_router_is_right():
    check_router(ToyConfig(module=ToyRouter))


@pytest.mark.parametrize(
    ("bug", "told"), ROUTER_BUGS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_bug_in_a_router_is_caught(bug, told):
    with pytest.raises(AssertionError, match=told):
        check_router(ToyConfig(module=bug))


def test_an_error_in_a_router_tells_when_it_happened():
    with pytest.raises(RuntimeError, match="amax") as caught:
        check_router(ToyConfig(module=Crowded))
    assert caught.value.__notes__ == ["while it routed 0 tokens in torch.float64"]


class NoisyInTraining(ToyRouter):
    """Noise on the logits in training, its size learned (Shazeer et al. 2017)."""

    def __init__(self, d_model):
        self.noise = None
        super().__init__(d_model)
        self.noise = nn.Parameter(torch.empty(5, d_model))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        if self.noise is not None:
            nn.init.zeros_(self.noise)

    def logits(self, x_ND):
        logits_NE = super().logits(x_ND)
        if self.training:
            deviation_NE = nn.functional.softplus(x_ND @ self.noise.T)
            logits_NE = logits_NE + deviation_NE * torch.randn_like(logits_NE)
        return logits_NE


class Hashing(ToyRouter):
    """Learns nothing: signs of fixed projections."""

    def __init__(self, d_model):
        nn.Module.__init__(self)
        self.selection_bias = None
        self.register_buffer("planes", torch.empty(2, d_model))

    def forward(self, x_ND):
        bits_N2 = x_ND.float() @ self.planes.float().T > 0
        experts_N1 = (bits_N2 * torch.tensor([1, 2])).sum(dim=1, keepdim=True)
        scores_NE = nn.functional.one_hot(experts_N1[:, 0], 5).float()
        return Routing(torch.ones(len(x_ND), 1), experts_N1, scores_NE, scores_NE)


class NamesOfPapers(ToyRouter):
    def weigh(self, scores_NE, experts_NK):
        g_t, h_n = scores_NE, experts_NK
        return super().weigh(g_t, h_n)


@pytest.mark.parametrize("kind", [NoisyInTraining, Hashing, NamesOfPapers])
def test_what_others_do_in_other_ways_is_no_bug(kind):
    check_router(ToyConfig(module=kind))


# --- experts


class ToyExperts(nn.Module):
    """Six linear experts, one token and slot after the other."""

    def __init__(self, d_model=12):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, d_model, d_model))
        self.bias = nn.Parameter(torch.empty(6, d_model))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def expert(self, e, x_D):
        return self.weight[e] @ x_D + self.bias[e]

    def add_slots(self, x_D, weights, experts):
        terms = [w * self.expert(e, x_D) for w, e in zip(weights, experts, strict=True) if e < 6]
        return sum(terms, torch.zeros_like(x_D))

    def forward(self, x_ND, routing):
        rows = zip(x_ND, routing.weights_NK, routing.experts_NK.tolist(), strict=True)
        outputs = [self.add_slots(*row) for row in rows]
        return torch.stack(outputs) if outputs else x_ND


class SquaredWeights(ToyExperts):
    def add_slots(self, x_D, weights, experts):
        return super().add_slots(x_D, weights**2, experts)


class FirstSlot(ToyExperts):
    def add_slots(self, x_D, weights, experts):
        return super().add_slots(x_D, weights[:1], experts[:1])


class Normalised(ToyExperts):
    def add_slots(self, x_D, weights, experts):
        return super().add_slots(x_D, weights / weights.sum(), experts)


class LastForEmpty(ToyExperts):
    """An empty slot runs the last expert, with its weight of 0, and adds its bias."""

    def add_slots(self, x_D, weights, experts):
        extra_D = self.bias[5] * experts.count(6)
        return super().add_slots(x_D, weights, experts) + extra_D


class OneExpert(ToyExperts):
    def expert(self, e, x_D):
        return super().expert(e % 5, x_D)


class DetachedInput(ToyExperts):
    def expert(self, e, x_D):
        return super().expert(e, x_D.detach()) + 0 * x_D


class FirstTokenAlone(ToyExperts):
    def forward(self, x_ND, routing):
        y_ND = super().forward(x_ND, routing)
        return y_ND + (x_ND.mean(dim=0) if len(x_ND) else 0) * routing.weights_NK.sum(1)[:, None]


class SlotOrder(ToyExperts):
    def add_slots(self, x_D, weights, experts):
        terms = [
            w * (k + 1) * self.expert(e, x_D)
            for k, (w, e) in enumerate(zip(weights, experts, strict=True))
            if e < 6
        ]
        return sum(terms, torch.zeros_like(x_D))


class Skipping(ToyExperts):
    def expert(self, e, x_D):
        return super().expert(e, x_D) * (e != 5)


class PositiveOnly(ToyExperts):
    def add_slots(self, x_D, weights, experts):
        return super().add_slots(x_D, weights.relu(), experts)


class Capped(ToyExperts):
    """An expert takes sixteen tokens and drops the others."""

    def forward(self, x_ND, routing):
        E, experts_NK = 6, routing.experts_NK.clone()
        for expert in range(E):
            rows, slots = torch.where(experts_NK == expert)
            experts_NK[rows[16:], slots[16:]] = E
        return super().forward(
            x_ND, Routing(routing.weights_NK, experts_NK, routing.scores_NE, routing.logits_NE)
        )


class WrongDtype(ToyExperts):
    def forward(self, x_ND, routing):
        return super().forward(x_ND, routing).float()


EXPERT_BUGS = {
    SquaredWeights: "not linear in the weights",
    FirstSlot: "not the sum of its slots",
    Normalised: "not linear in the weights",
    LastForEmpty: "not linear|whose slots are empty gets an output|sum of its slots",
    OneExpert: "experts 0 and 5 compute the same",
    DetachedInput: "the gradient of input 0 is wrong",
    FirstTokenAlone: "tokens in another order|by itself gets another output",
    SlotOrder: "not the sum of its slots",
    Skipping: "expert 5 computes nothing",
    PositiveOnly: "not linear in the weights",
    Capped: "sum of its slots|another output",
    WrongDtype: "experts must return .* and not .*float32",
}


def test_the_toy_experts_are_right():
    check_experts(ToyExperts(), 6)


@pytest.mark.parametrize(
    ("bug", "told"), EXPERT_BUGS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_bug_in_experts_is_caught(bug, told):
    with pytest.raises(AssertionError, match=told):
        check_experts(bug(), 6)


# --- feed-forward layers


class SeesNeighbour(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD + 0.1 * x_BTD.roll(1, dims=1))


class SeesRows(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD - x_BTD.mean(dim=0))


class ReadsWeight(ToyLayer):
    def forward(self, x_BTD):
        return self.down(torch.tanh(x_BTD @ self.up.weight.T))


class Widened(ToyLayer):
    def forward(self, x_BTD):
        y_BTD = super().forward(x_BTD)
        return y_BTD.float() if y_BTD.dtype == torch.bfloat16 else y_BTD


class NoPositions(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD) / (x_BTD.abs().amax() > -1)


class SeesFar(ToyLayer):
    def forward(self, x_BTD):
        y_BTD = super().forward(x_BTD)
        return torch.cat([y_BTD[:, :50], -y_BTD[:, 50:]], dim=1)


class WritesIntoInput(ToyLayer):
    def forward(self, x_BTD):
        with torch.no_grad():
            x_BTD.clamp_(-1, 1)
        return super().forward(x_BTD)


class Dropout(ToyLayer):
    def forward(self, x_BTD):
        return nn.functional.dropout(super().forward(x_BTD))


class RoundedGradient(ToyLayer):
    def forward(self, x_BTD):
        return super().forward(x_BTD) + (x_BTD - x_BTD.detach())


LAYER_BUGS = {
    SeesNeighbour: "position 0 by itself gets another output",
    SeesRows: "row 0 by itself gets another output|position 0",
    ReadsWeight: "up is read and not called",
    Widened: "in bfloat16, the layer must return .* and not .*float32",
    WritesIntoInput: "the layer writes into its input",
    SeesFar: "the last of 70 positions",
    Dropout: "by itself gets another output|differs from the first",
    RoundedGradient: "the gradient of input 0 is wrong",
}


def test_the_toy_layer_is_right():
    check_feed_forward(ToyConfig(module=ToyLayer))


@pytest.mark.parametrize(
    ("bug", "told"), LAYER_BUGS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_bug_in_a_feed_forward_layer_is_caught(bug, told):
    with pytest.raises(AssertionError, match=told):
        check_feed_forward(ToyConfig(module=bug))


# --- nothing is found in what is right


ROUTERS = {
    "softmax": TopK(num_experts=5, top_k=2, scoring="softmax", router_bias=True),
    "sigmoids": TopK(num_experts=5, top_k=2, scoring="sigmoid", selection_bias=True),
    "groups": tiny_moe().router,
    "groups by their best": tiny_moe(group_score="max", selection_bias=False).router,
    "one normalised": TopK(num_experts=4, top_k=1, scoring="softmax", normalize=True),
    "all": TopK(num_experts=3, top_k=3, scoring="softmax", normalize=True, normalize_minimum=0.2),
    "one expert": TopK(num_experts=1, top_k=1, scoring="sigmoid"),
    "weights' precision": TopK(
        num_experts=5, top_k=2, scoring="softmax", router_precision="weights"
    ),
    "top-p": TopP(num_experts=5, mass=0.7, max_experts=4),
    "expert choice": ExpertChoice(num_experts=5, capacity=1.5),
    "from outside": CosineRouterConfig(num_experts=5, slots=3, least_cosine=-0.1),
}
LAYERS = {
    "dense": DenseConfig(width=7),
    "gated shared expert": tiny_moe(shared_gate=True, expert_biases=True),
    "clamped": tiny_moe(clamp=Clamp(limit=0.8, alpha=1.2), shared_width=0),
    "from outside": SquaredConfig(width=5, leak=0.1),
    **{name: MoEConfig(router=router, expert_width=4) for name, router in ROUTERS.items()},
}


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_nothing_is_found_in_any_router(config):
    check_router(config)


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_nothing_is_found_in_any_feed_forward_layer(config):
    check_feed_forward(config)


class Grouped(Experts):
    def forward(self, x_ND, routing):
        weights = self.gate, self.up, self.down
        return experts_grouped(x_ND, routing.weights_NK, routing.experts_NK, *weights)


@pytest.mark.parametrize("num_experts", [1, 6])
@pytest.mark.parametrize("options", [{}, {"biases": True, "clamp": Clamp(limit=1.0, alpha=1.7)}])
def test_nothing_is_found_in_the_experts(num_experts, options):
    check_experts(Experts(12, num_experts, 5, **options), num_experts)
    check_experts(Grouped(12, num_experts, 5), num_experts)


def test_a_module_in_the_place_of_its_config_is_told():
    for check in (check_router, check_feed_forward):
        with pytest.raises(TypeError, match="a ToyRouter: the check takes a config"):
            check(ToyRouter(12))
    with pytest.raises(AssertionError, match="must return a tensor, and not a Routing"):
        check_feed_forward(ToyConfig(module=ToyRouter))


# --- what tests are made of


def test_noise_is_seeded_and_the_same_in_every_dtype():
    assert noise(3, 4).dtype == torch.float64
    assert noise(3, 4).equal(noise(3, 4))
    assert not noise(3, 4).equal(noise(3, 4, seed=1))
    assert noise(3, 4, dtype=torch.float32).equal(noise(3, 4).float())
    assert noise(5000).std().item() == pytest.approx(1, abs=0.05)


def test_close_says_what_differs():
    close(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), 1e-6)
    with pytest.raises(
        AssertionError, match="the norm: .*\n*.*Greatest|the norm: Scalars|the norm"
    ):
        close(torch.tensor([1.0]), torch.tensor([2.0]), what="the norm")


def test_randomize_leaves_no_value_at_its_start_and_whole_numbers_as_they_are():
    layer = tiny_moe(expert_biases=True).build(12)
    layer.register_buffer("order", torch.arange(4))
    layer.register_buffer("table", torch.ones(3), persistent=False)  # no file holds it
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    after = randomize(layer).state_dict()
    assert {name for name in after if after[name].equal(before[name])} == {"order"}
    assert layer.table.equal(torch.ones(3))
    floating = [tensor for name, tensor in after.items() if name != "order"]
    assert all(not a.flatten()[0].equal(b.flatten()[0]) for a, b in pairwise(floating))


def test_random_routings_have_empty_slots_and_distinct_experts():
    routing = random_routing(50, 4)
    assert routing.experts_NK.shape == (50, 3)
    assert (routing.experts_NK == 4).any()
    assert all(len(set(row)) == 3 for row in routing.experts_NK.tolist())
    assert random_routing(3, 1).experts_NK.shape == (3, 1)


def test_tiny_configs_take_fields_of_the_layer_and_of_its_router():
    changed = tiny_moe(num_experts=4, num_groups=2, top_k=1, expert_width=3)
    assert (changed.router.num_experts, changed.router.top_k, changed.expert_width) == (4, 1, 3)
    assert tiny_moe(router=ROUTERS["top-p"]).router is ROUTERS["top-p"]


def test_under_a_profiler_that_cannot_be_given_back_names_are_not_watched():
    import cProfile

    with cProfile.Profile():
        check_router(ToyConfig(module=WrongName))


def test_what_is_checked_needs_no_gradients_of_the_caller():
    with torch.no_grad():
        check_router(ToyConfig(module=ToyRouter))
        check_feed_forward(ToyConfig(module=ToyLayer))


def test_the_profiler_of_others_is_given_back():
    import sys

    seen = []
    sys.setprofile(lambda *event: seen.append(event))
    mine = sys.getprofile()
    with watch_names(lambda file: False):
        pass
    kept = sys.getprofile()
    sys.setprofile(None)
    assert kept is mine
