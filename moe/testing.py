"""A test kit for whoever writes a router, experts or a feed-forward layer: `check_router` ...

A check takes the config of a part, or the part, fills it with noise in float64, and raises an
AssertionError that says what does not hold. It goes by the contracts alone, needs nothing but
torch, and takes well under a second. Each check is made of smaller ones, which can be called by
themselves where a part breaks one on purpose.

Shapes: N tokens, D model width, E experts, K slots of a token, B batch, T positions.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .layer import MoEConfig
from .routing import Router, Routing, TopK

WIDTH = 12  # d_model of the parts that are checked

# --- what tests are made of


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random numbers, the same for the same seed in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and persistent buffer with noise; returns the module.

    Matrices are wide enough that scores are uneven. The rest lies around where it begins: norms
    around 1, biases around 0. Whole numbers stay as they are, and so do buffers that no file holds.
    """
    generator, saved = torch.Generator().manual_seed(seed), module.state_dict().keys()
    buffers = [tensor for name, tensor in module.named_buffers() if name in saved]
    for tensor in [*module.parameters(), *buffers]:
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                tensor.copy_(drawn * 2.5 / tensor.shape[-1] ** 0.5)
            else:
                tensor.copy_(tensor.mean().round() + 0.4 * drawn)
    return module


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    """Raise AssertionError unless two tensors are equal, to a relative and absolute tolerance."""
    told = f"{what}: {{}}".format if what else None
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=told)


def expect(holds: bool | Tensor, what: str) -> None:
    """Raise AssertionError, with these words, unless it holds."""
    if not holds:
        raise AssertionError(what)


@contextmanager
def noting(what: str) -> Iterator[None]:
    """Add these words to what is raised inside, which may be an error of the part itself."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def build(config: Any, d_model: int = WIDTH, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The part that a config builds, filled with noise, ready to be used."""
    if not hasattr(config, "build"):
        raise TypeError(f"a {type(config).__name__}: the check takes a config, with `build`")
    return randomize(config.build(d_model).to(dtype), seed=1).requires_grad_(False).eval()


def tiny_moe(**changes: Any) -> MoEConfig:
    """Eight experts in four groups, chosen by biased sigmoids, with a shared one.

    changes: fields of `MoEConfig` or of its `TopK` router.
    """
    of_router = {name: changes.pop(name) for name in list(changes) if name in ROUTER_FIELDS}
    router = changes.pop("router", replace(GROUPED, **of_router))
    return replace(MoEConfig(router=router, expert_width=5, shared_width=9), **changes)


ROUTER_FIELDS = TopK.__dataclass_fields__.keys()
GROUPED = TopK(
    num_experts=8,
    top_k=3,
    scoring="sigmoid",
    selection_bias=True,
    num_groups=4,
    groups_kept=2,
    group_score="top2_sum",
    normalize=True,
    normalize_epsilon=1e-20,
    scale=1.7,
)


# --- names and shapes

SUFFIX = re.compile(r"_([A-Z][A-Za-z0-9]*|[a-z](?:[A-Z0-9][A-Za-z0-9]*)?)$")


CAPITAL = re.compile(r"_([A-Z][A-Za-z0-9]*)$")


def wrong_shapes(
    tensors: dict[str, Tensor], leading: bool, suffix: re.Pattern = SUFFIX
) -> Iterator[str]:
    """Complaints about the tensors of one call whose names end in a suffix.

    x_BTD has three dimensions, and a letter is one size within a call. Upper and lower case are
    different letters; a digit is a dimension of that size. A dimension of size 1 may stand for any
    other: it broadcasts. leading: a suffix names the last dimensions only. suffix: of a name.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        letters = suffix.search(name)
        if letters is None:
            continue
        shape = tuple(tensor.shape)[-len(letters[1]) :] if leading else tuple(tensor.shape)
        if len(shape) != len(letters[1]):
            yield f"{name} has {len(shape)} dimensions"
            continue
        for letter, size in zip(letters[1], shape, strict=True):
            known, where = (int(letter), "its name") if letter.isdigit() else (size, name)
            known, where = sizes.setdefault(letter, (known, where))
            if known == 1 and not letter.isdigit():
                sizes[letter] = size, name
            elif size != known and (size != 1 or letter.isdigit()):
                yield f"{name}: {letter} = {size}, but {known} in {where}"


@contextmanager
def watch_names(
    files: Callable[[str], bool], suffix: re.Pattern = SUFFIX
) -> Iterator[dict[str, set[str]]]:
    """Collect {function: complaints} for every function of these files that returns inside.

    files: whether the functions of a file are watched. Where a file's docstring says
    "Shapes: ... any leading dimensions", a suffix names the last dimensions.
    """
    found: dict[str, set[str]] = {}

    def on_event(frame: FrameType, event: str, value: object) -> None:
        if event == "return" and files(frame.f_code.co_filename):
            values = frame.f_locals.items()
            tensors = {name: value for name, value in values if isinstance(value, Tensor)}
            leading = "Shapes: ... any" in (frame.f_globals.get("__doc__") or "")
            place = f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_qualname}"
            found.setdefault(place, set()).update(wrong_shapes(tensors, leading, suffix))

    before = sys.getprofile()
    if before is not None and not callable(before):  # cProfile's cannot be given back
        yield found
        return
    sys.setprofile(on_event)
    try:
        yield found
    finally:
        sys.setprofile(before)


def check_names(module: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """While `run(module)` runs, names tell shapes in the files of the module's own classes.

    Only suffixes that begin with a capital letter count: others are h_t, as papers write it.
    """
    forwards = (getattr(type(part).forward, "__code__", None) for part in module.modules())
    files = {code.co_filename for code in forwards if code is not None}
    own = {file for file in files if "/torch/nn/" not in Path(file).as_posix()}
    with watch_names(own.__contains__, CAPITAL) as found:
        run(module)
    wrong = [f"{place}: {told}" for place, all_told in found.items() for told in sorted(all_told)]
    told = (
        "all else holds, but names do not tell shapes (x_BTD: a letter is one size in a function)"
    )
    expect(not wrong, f"{told}: {'; '.join(wrong)}")


# --- what every part has in common

Run = Callable[[nn.Module], Tensor]  # what a module makes of some fixed input


def check_built(config: Any, d_model: int = WIDTH) -> None:
    """A part is built without reading values, `reset_parameters` draws all of it, and its tensors
    are in its state_dict: so it can be initialised, saved and loaded."""
    try:
        with torch.device("meta"):
            config.build(d_model)
    except (NotImplementedError, RuntimeError) as error:
        raise AssertionError(f"cannot be built on the meta device: {error}") from error
    for path, module in config.build(d_model).named_modules():
        check_reset(path or "it", module)
        check_tensors_are_saved(path or "it", module)


def check_copied(config: Any, run: Run, d_model: int = WIDTH) -> None:
    """A copy loaded from the state_dict computes the same, and so does a second call."""
    first, second = build(config, d_model), randomize(build(config, d_model), seed=9)
    second.load_state_dict(first.state_dict())
    expected, loaded = run(first), run(second)
    close(loaded, expected, 1e-12, "a copy loaded from the state_dict differs: is a tensor missing")
    close(run(first), expected, 1e-12, "the second call differs from the first")


@torch.no_grad()
def check_reset(path: str, module: nn.Module) -> None:
    """`reset_parameters` draws every parameter that a module owns."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return
    what = f"{path}, a {type(module).__name__},"
    reset: Any = getattr(module, "reset_parameters", None)
    expect(reset is not None, f"{what} owns {', '.join(own)} and has no reset_parameters")
    for parameter in own.values():
        parameter.fill_(float("nan"))
    reset(**({"std": 0.02} if "std" in signature(reset).parameters else {}))
    for name, parameter in own.items():
        expect(parameter.isfinite().all(), f"reset_parameters of {what} does not set {name}")


def check_tensors_are_saved(path: str, module: nn.Module) -> None:
    """Every tensor of a module is a parameter or a persistent buffer, and what it declares by name
    is there."""
    what, saved = f"{path}, a {type(module).__name__},", module.state_dict().keys()
    buffers = dict(module.named_buffers(recurse=False))
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    lost = [*plain, *(name for name in buffers if name not in saved)]
    expect(not lost, f"{what} keeps {', '.join(lost)} in no file: make it a persistent buffer")
    for declared in ("residual_outputs", "quantizable", "exact"):
        known = {*dict(module.named_parameters()), *module._buffers, *module._parameters}
        unknown = set(getattr(module, declared, ())) - known
        expect(not unknown, f"{declared} of {what} names no tensor: {', '.join(unknown)}")


@torch.enable_grad()
def check_gradients(module: nn.Module, run: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The gradients of `run(module, *inputs)` are those of finite differences, in float64.

    One random direction is tried for each input and each parameter, so it costs two forwards each.
    A parameter may be used in training mode alone, like that of a noise: there it has a gradient.
    """
    module.requires_grad_(True)
    tracked = [tensor.clone().requires_grad_(True) for tensor in inputs]
    named = {f"input {i}": tensor for i, tensor in enumerate(tracked)}
    named |= dict(module.named_parameters())
    y = run(module, *tracked)
    weights = noise(*y.shape, seed=3)
    found = find_gradients((y * weights).sum(), named)
    in_training = find_gradients((run(module.train(), *tracked) * weights).sum(), named)
    module.eval().requires_grad_(False)
    for name, tensor in named.items():
        gradient = found[name]
        known = in_training[name] if gradient is None else gradient
        expect(known is not None, f"no gradient reaches {name}")
        told = f"in training mode, the gradient of {name} is not finite"
        expect(in_training[name] is None or in_training[name].isfinite().all(), told)
        if gradient is None:
            continue
        direction = noise(*tensor.shape, seed=4)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                tensor += step * direction
                ends.append((run(module, *tracked) * weights).sum())
                tensor -= step * direction
        expected, slope = (ends[0] - ends[1]) / 2e-6, (gradient * direction).sum()
        scale = max(1.0, float(expected.abs()))
        close(slope / scale, expected / scale, 1e-5, f"the gradient of {name} is wrong")


def find_gradients(total: Tensor, named: dict[str, Tensor]) -> dict[str, Any]:
    """The gradient of each tensor, None for one that the total does not depend on."""
    if not total.requires_grad:
        return dict.fromkeys(named)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@torch.enable_grad()
def check_calls(module: nn.Module, run: Run) -> None:
    """Every submodule whose parameters matter is called, so adapters and hooks on it act."""
    module.requires_grad_(True)
    owners = {path: part for path, part in module.named_modules() if path and own_parameters(part)}
    called: set[str] = set()
    hooks = [
        part.register_forward_hook(lambda *args, path=path: called.add(path))
        for path, part in owners.items()
    ]
    y = run(module)
    for hook in hooks:
        hook.remove()
    for path, part in owners.items():
        if path not in called:
            parameters = own_parameters(part)
            found = torch.autograd.grad(y.sum(), parameters, retain_graph=True, allow_unused=True)
            read = any(gradient is not None for gradient in found)
            expect(not read, f"{path} is read and not called: an adapter on it would not act")
    module.requires_grad_(False)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


# --- routers


def check_router(config: Any, d_model: int = WIDTH) -> None:
    """Everything that a sparse layer, losses, balancing and recording ask of a router.

    config: a `RouterConfig`. See `moe.Router` and `moe.Routing` for the contract.
    """
    router, x_ND = build(config, d_model), noise(9, d_model)

    def run(router: nn.Module, x_ND: Tensor = x_ND) -> Tensor:
        return spread_routing(router(x_ND))

    check_built(config, d_model)
    check_router_contract(config, router)
    check_routings(config, d_model)
    check_order_of_tokens(router, x_ND)
    check_autocast(config, d_model)
    check_selection_bias(router, x_ND)
    check_choice(config, router, noise(40, d_model, seed=2))
    check_copied(config, run, d_model)
    check_calls(router, run)
    if has_gradients(router, x_ND):
        check_gradients(router, run, x_ND)
    check_names(router, run)


def check_router_contract(config: Any, router: nn.Module) -> None:
    expect(isinstance(router, Router), "the module has no num_experts or no selection_bias")
    E = config.num_experts
    expect(router.num_experts == E, f"num_experts is {router.num_experts}, in the config {E}")
    used = config.experts_per_token
    expect(0 < used <= E, f"experts_per_token = {used}: not from above 0 to {E}")


def check_routings(config: Any, d_model: int = WIDTH) -> None:
    """What a router returns has the right shapes, dtypes and values, for no token too."""
    E = config.num_experts
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        router = build(config, d_model, dtype)
        for N, size in ((0, 1), (1, 1), (9, 1), (9, 300)):
            what = f"{N} tokens in {dtype}" + (f", {size} times as large" if size > 1 else "")
            with noting(f"while it routed {what}"):
                routing = router(size * noise(N, d_model, dtype=dtype))
            expect(isinstance(routing, Routing), f"returns a {type(routing).__name__}: no Routing")
            check_routing(routing, N, E, f"of {what}")


def check_routing(routing: Routing, N: int, E: int, what: str = "") -> None:
    """One `Routing` of N tokens among E experts keeps the contract."""
    try:
        routing.check()
    except ValueError as error:
        raise AssertionError(f"the routing {what}: {error}") from error
    weights_NK, experts_NK = routing.weights_NK, routing.experts_NK
    expect(len(weights_NK) == N, f"the routing {what} has {len(weights_NK)} rows")
    for name in ("scores_NE", "logits_NE"):
        values = getattr(routing, name)
        wide = values.dtype.itemsize >= 4
        shape = tuple(values.shape)
        expect(shape == (N, E) and wide, f"{name} {what}: {values.dtype} of shape {shape}")
        expect(not values.isnan().any(), f"{name} {what} are not all numbers")
    inside = ((experts_NK >= 0) & (experts_NK <= E)).all()
    expect(inside, f"experts {what} are outside 0 to {E}: an empty slot holds {E}")
    empty_NK = experts_NK == E
    expect((weights_NK[empty_NK] == 0).all(), f"an empty slot {what} has a weight other than 0")
    expect(weights_NK.isfinite().all(), f"weights {what} are not all finite")
    for token, experts_K in enumerate(experts_NK.tolist()):
        used = [expert for expert in experts_K if expert != E]
        expect(len(set(used)) == len(used), f"token {token} {what} has an expert twice: {used}")


def spread_weights(routing: Routing) -> Tensor:
    """The weight of every expert for every token, (N, E): 0 where it was not chosen."""
    weights_NK, (N, E) = routing.weights_NK, routing.scores_NE.shape
    zeros_Ne = weights_NK.new_zeros(N, E + 1)
    return zeros_Ne.scatter_add(1, routing.experts_NK, weights_NK)[:, :E]


def spread_routing(routing: Routing) -> Tensor:
    """Weights, scores and logits of every expert for every token, (N, 3E)."""
    return torch.cat([spread_weights(routing), routing.scores_NE, routing.logits_NE], dim=1)


def check_choice(config: Any, router: Any, x_ND: Tensor) -> None:
    """A token uses no more experts than the config says, and scores are higher where it does.

    x_ND: of many tokens, since both hold on average only.
    """
    bias_E = router.selection_bias
    if bias_E is not None:
        router.selection_bias = torch.zeros_like(bias_E)
    routing, E = router(x_ND), config.num_experts
    used = (routing.experts_NK != E).sum().item() / len(x_ND)
    told = f"a token uses {used:g} experts, and experts_per_token is {config.experts_per_token}"
    expect(used <= config.experts_per_token + E / len(x_ND), told)
    ones_NK = (routing.experts_NK != E).to(routing.weights_NK.dtype)
    chosen_NE = spread_weights(reweigh(routing, ones_NK)) > 0
    if 0 < chosen_NE.sum() < chosen_NE.numel():
        higher = routing.scores_NE[chosen_NE].mean() > routing.scores_NE[~chosen_NE].mean()
        expect(higher, "scores of chosen experts are lower than those of others: are they theirs?")
    if bias_E is not None:
        router.selection_bias = bias_E


@torch.enable_grad()
def has_gradients(router: nn.Module, x_ND: Tensor) -> bool:
    """Whether there is anything to learn: not where a router hashes, without parameters, and its
    routing is constant around each state."""
    routed = spread_routing(router(x_ND.clone().requires_grad_(True)))
    return routed.requires_grad or any(True for _ in router.parameters())


def check_order_of_tokens(router: nn.Module, x_ND: Tensor) -> None:
    """Tokens in another order are routed in that order, and each as if it were alone, unless the
    router says `sees_other_tokens`."""
    whole_Ne = spread_routing(router(x_ND))
    order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(0))
    moved_Ne = spread_routing(router(x_ND[order_N]))
    close(moved_Ne, whole_Ne[order_N], 1e-9, "routing depends on the order of the tokens")
    if not getattr(router, "sees_other_tokens", False):
        alone_Ne = torch.cat([spread_routing(router(x_1D)) for x_1D in x_ND.split(1)])
        told = "a token's routing depends on other tokens, and sees_other_tokens does not say so"
        close(alone_Ne, whole_Ne, 1e-9, told)


def check_autocast(config: Any, d_model: int = WIDTH) -> None:
    """Autocast, which training uses, changes no choice, weight, score or logit."""
    router, x_ND = build(config, d_model, torch.float32), noise(9, d_model, dtype=torch.float32)
    expected_Ne = spread_routing(router(x_ND))
    with torch.autocast(x_ND.device.type, torch.bfloat16):
        found_Ne = spread_routing(router(x_ND))
    close(found_Ne, expected_Ne, 1e-6, "autocast changes the routing: see moe.exact_products")


def check_selection_bias(router: nn.Module, x_ND: Tensor) -> None:
    """The bias takes part in choosing: a higher one draws tokens. It takes no part in weighing: the
    same bias for all experts changes nothing, and neither does another bias where a token keeps its
    experts."""
    bias_E: Any = router.selection_bias
    if bias_E is None:
        return
    expect(bias_E.shape == (router.num_experts,), f"selection_bias has shape {bias_E.shape}")
    named = "selection_bias" in dict(router.named_buffers(recurse=False))
    expect(named, "selection_bias is no buffer: an optimizer must not move it")
    told = "selection_bias takes part in weights or scores: gather them from unbiased scores"
    before, kept_E = router(x_ND), bias_E.clone()
    for change_E in (torch.full_like(bias_E, 0.5), 0.02 * noise(len(bias_E), seed=8).to(bias_E)):
        bias_E += change_E
        after = router(x_ND)
        same_N = (before.experts_NK.sort().values == after.experts_NK.sort().values).all(dim=1)
        expect(
            same_N.all() or change_E.std() > 0, "an equal selection_bias for all experts matters"
        )
        close(spread_weights(after)[same_N], spread_weights(before)[same_N], 1e-9, told)
        close(after.scores_NE, before.scores_NE, 1e-9, told)
        close(after.logits_NE, before.logits_NE, 1e-9, told)
        bias_E.copy_(kept_E)
    drawn = []
    for expert in range(len(bias_E)):
        uses = []
        for change in (-20.0, 20.0):
            bias_E[expert] += change
            uses.append(int((router(x_ND).experts_NK == expert).sum()))
            bias_E[expert] -= change
        expect(uses[1] >= uses[0], f"expert {expert} loses tokens when its selection_bias rises")
        drawn.append(uses[1] > uses[0])
    expect(any(drawn), "selection_bias changes no choice")


# --- experts


def check_experts(experts: nn.Module, num_experts: int, d_model: int = WIDTH) -> None:
    """y_n = sum over k of weights[n, k] * expert(experts[n, k], x_n), however it is computed.

    experts: a module that is called with x_ND and a `Routing`, as `moe.Experts`.
    """
    experts = randomize(experts.double(), seed=1).requires_grad_(False).eval()
    E, x_ND = num_experts, noise(40, d_model)
    check_output(experts(x_ND, random_routing(40, E)), x_ND, "experts must")
    with noting("while experts ran on no token"):
        check_output(experts(x_ND[:0], random_routing(0, E)), x_ND[:0], "experts must")
    check_weighted_sum(experts, x_ND, E)
    check_empty_slots(experts, x_ND, E)
    check_order_of_rows(experts, x_ND, E)
    check_every_expert_differs(experts, x_ND, E)
    routing = random_routing(40, E)

    def run(experts: nn.Module, x_ND: Tensor, weights_NK: Tensor) -> Tensor:
        return experts(x_ND, reweigh(routing, weights_NK))

    check_calls(experts, lambda experts: experts(x_ND, routing))
    check_gradients(experts, run, x_ND, routing.weights_NK)
    check_names(experts, lambda experts: experts(x_ND, routing))


def random_routing(N: int, E: int, K: int = 3, seed: int = 0) -> Routing:
    """N tokens that use up to K of E experts: some slots are empty, some experts have no token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(E + 1, generator=generator)[: min(K, E)] for _ in range(N)]
    experts_NK = torch.stack(rows) if rows else torch.zeros(0, min(K, E), dtype=torch.int64)
    weights_NK = noise(*experts_NK.shape, seed=seed).masked_fill(experts_NK == E, 0)
    scores_NE = torch.ones(N, E, dtype=torch.float64)
    return Routing(weights_NK, experts_NK, scores_NE, scores_NE)


def reweigh(routing: Routing, weights_NK: Tensor) -> Routing:
    return Routing(weights_NK, routing.experts_NK, routing.scores_NE, routing.logits_NE)


def check_output(y: Tensor, x: Tensor, what: str) -> None:
    """An output has the shape and dtype of its input."""
    expect(isinstance(y, Tensor), f"{what} return a tensor, and not a {type(y).__name__}")
    found, expected = (tuple(y.shape), y.dtype), (tuple(x.shape), x.dtype)
    expect(found == expected, f"{what} return {expected}, and not {found}")
    expect(y.isfinite().all(), f"{what} return finite values")


def check_weighted_sum(experts: nn.Module, x_ND: Tensor, E: int) -> None:
    """The output is linear in the weights, and the sum of the slots by themselves."""
    routing = random_routing(len(x_ND), E)
    total_ND = experts(x_ND, routing)
    for factor in (2, -1):
        found_ND = experts(x_ND, reweigh(routing, factor * routing.weights_NK))
        close(found_ND, factor * total_ND, 1e-9, "the output is not linear in the weights")
    slots = []
    for k in range(routing.experts_NK.shape[1]):
        weights_N1, experts_N1 = routing.weights_NK[:, k : k + 1], routing.experts_NK[:, k : k + 1]
        one = Routing(weights_N1, experts_N1, routing.scores_NE, routing.logits_NE)
        slots.append(experts(x_ND, one))
    close(sum(slots[1:], slots[0]), total_ND, 1e-9, "the output is not the sum of its slots")


def check_empty_slots(experts: nn.Module, x_ND: Tensor, E: int) -> None:
    """A slot that holds expert E adds nothing, and tokens without any expert get zeros."""
    routing = random_routing(len(x_ND), E)
    empty_NK = torch.full_like(routing.experts_NK, E)
    none = Routing(torch.zeros_like(routing.weights_NK), empty_NK, routing.scores_NE, x_ND)
    expect(not experts(x_ND, none).any(), "a token whose slots are empty gets an output")
    experts_NK = torch.cat([routing.experts_NK, empty_NK[:, :1]], dim=1)
    weights_NK = torch.nn.functional.pad(routing.weights_NK, (0, 1))
    padded = Routing(weights_NK, experts_NK, routing.scores_NE, routing.logits_NE)
    expected_ND = experts(x_ND, routing)
    close(experts(x_ND, padded), expected_ND, 1e-9, "one more slot, which is empty, changes it")


def check_order_of_rows(experts: nn.Module, x_ND: Tensor, E: int) -> None:
    """Tokens and slots may come in any order, and each token as if it were alone."""
    routing = random_routing(len(x_ND), E)
    whole_ND = experts(x_ND, routing)
    order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(0))
    fields = (routing.weights_NK, routing.experts_NK, routing.scores_NE, routing.logits_NE)
    moved = Routing(*(tensor[order_N] for tensor in fields))
    told = "tokens in another order get other outputs"
    close(experts(x_ND[order_N], moved), whole_ND[order_N], 1e-9, told)
    flipped = Routing(fields[0].flip(1), fields[1].flip(1), *fields[2:])
    close(experts(x_ND, flipped), whole_ND, 1e-9, "slots in another order give another output")
    for n in range(len(x_ND)):
        alone = Routing(*(tensor[n : n + 1] for tensor in fields))
        told = f"token {n} by itself gets another output than among others"
        close(experts(x_ND[n : n + 1], alone), whole_ND[n : n + 1], 1e-9, told)


def check_every_expert_differs(experts: nn.Module, x_ND: Tensor, E: int) -> None:
    """Each expert computes something of its own."""
    outputs: list[Tensor] = []
    for expert in range(E):
        experts_N1 = torch.full((len(x_ND), 1), expert)
        weights_N1 = torch.ones(len(x_ND), 1, dtype=x_ND.dtype)
        scores_NE = torch.ones(len(x_ND), E, dtype=x_ND.dtype)
        outputs.append(experts(x_ND, Routing(weights_N1, experts_N1, scores_NE, scores_NE)))
        expect(outputs[-1].any(), f"expert {expert} computes nothing")
    for a in range(E):
        for b in range(a):
            same = torch.allclose(outputs[a], outputs[b])
            expect(not same, f"experts {b} and {a} compute the same with different weights")


# --- feed-forward layers


def check_feed_forward(config: Any, d_model: int = WIDTH) -> None:
    """(B, T, D) -> (B, T, D), token by token, with everything that training and files ask.

    config: a `FeedForwardConfig`, of a dense or a sparse layer.
    """
    module, x_BTD = build(config, d_model), noise(2, 5, d_model)

    def run(module: nn.Module, x_BTD: Tensor = x_BTD) -> Tensor:
        return module(x_BTD)

    check_built(config, d_model)
    kept_BTD = x_BTD.clone()
    for x in (x_BTD, x_BTD[:, :1], x_BTD[:, :0]):
        with noting(f"while it ran on {x.shape[1]} positions"):
            check_output(module(x), x, "the layer must")
    expect(x_BTD.equal(kept_BTD), "the layer writes into its input")
    half = build(config, d_model, torch.bfloat16)
    check_output(half(x_BTD.bfloat16()), x_BTD.bfloat16(), "in bfloat16, the layer must")
    if not any(getattr(part, "sees_other_tokens", False) for part in module.modules()):
        check_tokens_are_apart(module, x_BTD)
    check_copied(config, run, d_model)
    check_calls(module, run)
    check_gradients(module, run, x_BTD)
    check_names(module, run)


def check_tokens_are_apart(module: nn.Module, x_BTD: Tensor) -> None:
    """Each token gets the same output alone, in another place, and among others."""
    whole_BTD = module(x_BTD)
    for t in range(x_BTD.shape[1]):
        told = f"position {t} by itself gets another output than among others"
        close(module(x_BTD[:, t : t + 1]), whole_BTD[:, t : t + 1], 1e-9, told)
    for b in range(len(x_BTD)):
        told = f"row {b} by itself gets another output than among others"
        close(module(x_BTD[b : b + 1]), whole_BTD[b : b + 1], 1e-9, told)
    close(module(x_BTD.flip(1)), whole_BTD.flip(1), 1e-9, "the order of positions matters")
    long_1TD = noise(1, 70, x_BTD.shape[2], seed=3)
    told = "the last of 70 positions by itself gets another output than among others"
    close(module(long_1TD[:, -1:]), module(long_1TD)[:, -1:], 1e-9, told)
