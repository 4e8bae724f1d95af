"""The CPU's one-pass update: torch's arithmetic, the reference's rounding, whatever the layout, threads or machine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp8repro.engines.cpu import build
from fp8repro.engines.cpu import update as engine
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, FP16
from fp8repro.numerics.rounding import ORDERS, RandomBits, Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_step import Parameter, Rule, fused_step, unsupported
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

pytestmark = pytest.mark.skipif(build.load("update") is None, reason="no C++ compiler")

FP16_MASTER = Rounding("fp16", "stochastic")
RULES = {
    "sgd": Rule("sgd", 0.1, 0.9, weight_decay=1e-4),
    "plain sgd": Rule("sgd", 0.1, 0.0),
    "nesterov": Rule("sgd", 0.1, 0.9, weight_decay=1e-4, nesterov=True),
    "adam": Rule("adam", 0.01, weight_decay=1e-2),
    "adam that forgets": Rule("adam", 0.01, 0.3, 0.9),
    "adamw": Rule("adamw", 0.01, weight_decay=1e-2),
}
# torch's own code fuses multiply and add where the machine can; ours always does.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def torch_optimizer(rule: Rule, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if rule.name == "sgd":
        options = {"momentum": rule.momentum, "weight_decay": rule.weight_decay, "nesterov": rule.nesterov}
        return torch.optim.SGD(parameters, rule.lr, **options)
    build_it = torch.optim.Adam if rule.name == "adam" else torch.optim.AdamW
    return build_it(parameters, rule.lr, (rule.momentum, rule.beta2), rule.eps, rule.weight_decay)


def states_of(rule: Rule) -> int:
    return 2 if rule.name != "sgd" else 1 if rule.momentum else 0


def tensors(seed: int = 0) -> list[Tensor]:
    """Runs with and without tails; kernels in both layouts, rows in eights and not; matrices over a chunk."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 7), (1,), (129,), (40_000,), (8, 6, 3, 3), (3, 700, 5, 5), (5, 16, 2, 2), (9, 1, 3, 3), (0, 4)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made += [t.to(memory_format=torch.channels_last) for t in made if t.dim() == 4]
    made += [torch.randn(shape, generator=generator) for shape in ((6, 24, 5), (4, 8, 2, 3, 3))]
    # Transposed matrices: 33 rows in memory, and rows longer than a chunk.
    return [*made, torch.randn(33, 90, generator=generator).t(), torch.randn(9, 5000, generator=generator).t()]


def parameters_of(
    rule: Rule, masters: list[Tensor], grads: list[Tensor], measured: bool = False, order: str = "row_major"
) -> list[Parameter]:
    return [
        Parameter(
            m,
            g,
            tuple(torch.zeros_like(m, dtype=torch.float32) for _ in range(states_of(rule))),
            2**64 - 1 - i,
            updated=torch.empty_like(m, dtype=torch.float32) if measured else None,
            order=order,
        )
        for i, (m, g) in enumerate(zip(masters, grads, strict=True))
    ]


@pytest.mark.parametrize("name", RULES)
def test_three_steps_are_torchs(name: str) -> None:
    rule, scale = RULES[name], 1000.0
    expected = [nn.Parameter(t.clone()) for t in tensors()]
    optimizer = torch_optimizer(rule, expected)
    ours = parameters_of(rule, tensors(), tensors(seed=1), measured=True)
    for step in (1, 2, 3):
        ours = [replace(p, grad=g * scale) for p, g in zip(ours, tensors(seed=step), strict=True)]
        for parameter, mine in zip(expected, ours, strict=True):
            parameter.grad = mine.grad / scale
        norm = torch.nn.utils.get_total_norm([p.grad for p in expected])
        control = engine.gradient_control(ours, scale, clip_norm=1e6)
        assert control[2].item() == pytest.approx(norm.item(), rel=1e-6)
        engine.update(ours, rule, step, FP16_MASTER, Rounding(), control, scale)
        for mine in ours:
            mine.master.copy_(mine.updated)  # as if FP16 had been as wide
        optimizer.step()
    tolerance = {"rtol": 0, "atol": 0} if FUSES else {"rtol": 1e-5, "atol": 1e-6}
    # torch's square roots are not always the nearest FP32 value; a decayed weight brings that into the gradient.
    close = {"rtol": 1e-6, "atol": 1e-7}
    for given, wanted in zip(ours, expected, strict=True):
        moments = [v for k, v in optimizer.state[wanted].items() if k != "step" and v is not None]
        for mine, theirs in zip(given.state, moments, strict=True):
            torch.testing.assert_close(mine, theirs, **(close if name == "adam" else tolerance))
        torch.testing.assert_close(given.master, wanted.data, **(tolerance if rule.name == "sgd" else close))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("format", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_masters_are_the_rounded_results(rounding: str, format: object, stored: bool, order: str) -> None:
    rule, seed, spec = RULES["adam"], 2**63 + 9, Rounding("fp16" if format is FP16 else "bf16", rounding)
    masters = [t.to(format.dtype) for t in tensors()]
    masters = masters if stored else [m.float() for m in masters]
    grads = tensors(seed=1)
    grads[3][7], grads[3][8] = 3e38, 1e-30  # overflow and underflow of squares and of FP16
    parameters = parameters_of(rule, masters, grads, measured=True, order=order)
    engine.update(parameters, rule, 1, spec, Rounding(), engine.gradient_control(parameters), seed=seed)
    for p in parameters:
        wanted = reference.round_to_format(
            p.updated, Rounding(format, rounding), RandomBits(seed, p.master_stream, order)
        )
        assert torch.equal(p.master.float(), wanted)


@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
def test_every_machine_and_thread_count_gives_the_same_bytes(march: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if march != "native" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("not an x86-64 machine with AVX2")

    def masters(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        parameters = parameters_of(RULES["adam"], [t.half() for t in tensors()], tensors(seed=1))
        control = engine.gradient_control(parameters, 64.0, clip_norm=3.0)
        engine.update(parameters, RULES["adam"], 2, FP16_MASTER, Rounding(), control, 64.0, seed=5)
        return [control, *(p.master for p in parameters), *(s for p in parameters for s in p.state)]

    before = torch.get_num_threads()
    try:
        expected = masters(1)
        engine._library.cache_clear()
        load = build.load
        monkeypatch.setattr(build, "load", lambda name: load(name, march))
        for threads in (1, 2, 3):
            # A lesser machine's vectors are shorter: only the norm's order of addition differs.
            control, *given = masters(threads)
            torch.testing.assert_close(control, expected[0], rtol=1e-12, atol=0)
            assert all(torch.equal(a, b) for a, b in zip(given, expected[1:], strict=True))
    finally:
        torch.set_num_threads(before)
        engine._library.cache_clear()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_gradient_stops_every_tensor(bad: float) -> None:
    masters, grads = [t.half() for t in tensors()], tensors(seed=1)
    grads[2][128] = bad
    before = [m.clone() for m in masters]
    parameters = parameters_of(RULES["sgd"], masters, grads)
    control = engine.gradient_control(parameters)
    assert control[0] == 1
    engine.update(parameters, RULES["sgd"], 1, FP16_MASTER, Rounding(), control)
    assert all(torch.equal(m, b) for m, b in zip(masters, before, strict=True))
    assert not any(p.state[0].any() for p in parameters)


def test_squares_that_overflow_fp32_are_no_reason_to_skip() -> None:
    parameters = [Parameter(torch.zeros(8), torch.full((8,), 3e38))]
    bad, factor, norm = engine.gradient_control(parameters, 2.0**100, clip_norm=1.0).tolist()
    assert bad == 0
    assert norm == pytest.approx(3e38 * 8**0.5 / 2**100, rel=1e-6)
    assert factor == pytest.approx(1 / norm, rel=1e-6)


class Product(nn.Module):
    """Two FP8 layers in channels_last and a normalization: masters in FP16 and in FP32, two memory layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)


def test_telemetry_changes_no_byte_and_counts_lost_updates() -> None:
    recipe = replace(load_recipe("fp8"), exempt=())
    results = []
    for every in (0, 1):
        torch.manual_seed(0)
        model = Product().to(memory_format=torch.channels_last)
        inject(model, recipe, StepContext(seed=4), "emulate")
        masters = MasterWeights(model, torch.optim.Adam(model.parameters(), 1e-3), recipe)
        masters.context.telemetry.every = every
        for step in range(3):
            masters.context.begin(step)
            masters.context.telemetry.begin(step)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            assert masters.step(4.0, clip_norm=3.0)
        results.append([p.detach().clone() for p in model.parameters()])
        lost = masters.context.telemetry.lost_share()
        assert 0 < lost < 1 if every else math.isnan(lost)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_of_convolutions_count_channels_last_whoever_does_the_step(channels_last: bool) -> None:
    recipe = replace(load_recipe("fp8"), exempt=())
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Product()
        model = model.to(memory_format=torch.channels_last) if channels_last else model
        inject(model, recipe, StepContext(seed=4), "emulate")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        masters = MasterWeights(model, optimizer, recipe)
        if not fused:
            optimizer.register_step_pre_hook(lambda *_: None)
        assert (unsupported(optimizer) is None) == fused
        for step in range(2):
            masters.context.begin(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            assert masters.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert masters.orders["conv.weight"] == "channels_last"
    assert {order for name, order in masters.orders.items() if name != "conv.weight"} == {"row_major"}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointed_state_is_torchs() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert fused_step(engine, dict(model.named_parameters()), optimizer, FP16_MASTER, StepContext()) is not None
    theirs = torch.optim.Adam(model.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    theirs.step()
    assert all(state["step"] == 2 for state in theirs.state.values())


def test_hooks_around_the_optimizer_keep_its_own_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    assert unsupported(optimizer) is None
    optimizer.register_step_pre_hook(lambda *_: None)
    assert unsupported(optimizer) == "hooks around step() have no fused form"


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("master", {"master": torch.zeros(4, 4, dtype=torch.float64)}),
        ("master", {"master": torch.zeros(4, 8)[:, ::2]}),
        ("grad", {"grad": torch.zeros(4, 4).t()}),
        ("grad", {"grad": torch.zeros(4, 4, dtype=torch.float16)}),
        ("state", {"state": (torch.zeros(4),)}),
        ("weight", {"weight": torch.zeros(4, 4)}),
        ("updated", {"updated": torch.zeros(4, 4, dtype=torch.float16)}),
    ],
)
def test_bad_argument_is_named(argument: str, change: dict[str, Tensor]) -> None:
    given = {"master": torch.zeros(4, 4), "grad": torch.zeros(4, 4), "state": (torch.zeros(4, 4),), **change}
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        engine.update([Parameter(**given)], RULES["sgd"], 1, FP16_MASTER, Rounding(), torch.zeros(3).double())
