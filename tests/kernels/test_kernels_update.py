"""The fused optimizer step against torch's optimizers and the reference's roundings."""

import math
from dataclasses import replace

import pytest
import torch
from numeric import assert_close
from torch import nn

from fp8repro.engines.guards import spell
from fp8repro.kernels.optimizer import launch as engine
from fp8repro.kernels.optimizer.launch import gradient_control, update
from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.kernels.shared.tables import table_of
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E5M2, FP16
from fp8repro.numerics.rounding import ORDERS, RandomBits, Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_step import Parameter, Rule, fused_step, unsupported
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.telemetry import Telemetry
from fp8repro.settings.recipes import load_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = Rounding("fp32")
FP8 = Rounding("e5m2")
RULES = {
    "sgd": Rule("sgd", 0.1, 0.9, weight_decay=1e-4),
    "plain sgd": Rule("sgd", 0.1, 0.0),
    "nesterov": Rule("sgd", 0.1, 0.9, weight_decay=1e-4, nesterov=True),
    "adam": Rule("adam", 0.01, weight_decay=1e-2),
    "adamw": Rule("adamw", 0.01, weight_decay=1e-2),
}


def torch_optimizer(rule, parameters):
    if rule.name == "sgd":
        options = {"momentum": rule.momentum, "weight_decay": rule.weight_decay, "nesterov": rule.nesterov}
        return torch.optim.SGD(parameters, rule.lr, **options)
    build = torch.optim.Adam if rule.name == "adam" else torch.optim.AdamW
    return build(parameters, rule.lr, (rule.momentum, rule.beta2), rule.eps, rule.weight_decay)


def states_of(rule):
    return 2 if rule.name != "sgd" else 1 if rule.momentum else 0


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 7), (1,), (129,), (40_000,), (8, 6, 3, 3)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[-1] = made[-1].to(memory_format=torch.channels_last)
    return [t.to(DEVICE) for t in made]


@pytest.mark.parametrize("name", RULES)
def test_three_steps_equal_torch(name):
    rule, scale = RULES[name], 1024.0
    expected = [torch.nn.Parameter(t.clone()) for t in tensors()]
    optimizer = torch_optimizer(rule, expected)
    masters = tensors()
    states = [tuple(torch.zeros_like(m) for _ in range(states_of(rule))) for m in masters]
    for step in (1, 2, 3):
        grads = tensors(seed=step)
        for parameter, grad in zip(expected, grads, strict=True):
            parameter.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(expected, 5.0)
        optimizer.step()
        parameters = [Parameter(m, g * scale, s) for m, g, s in zip(masters, grads, states, strict=True)]
        control = gradient_control(parameters, scale, clip_norm=5.0)
        update(parameters, rule, step, EXACT, FP8, control, scale)
        assert_close(control[2], norm, 1e-5, scale=norm)
    for given, wanted in zip(masters, expected, strict=True):
        assert_close(given, wanted, 1e-6, scale=1 + 10 * wanted.abs())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("order", ORDERS)
def test_masters_and_weights_are_rounded_like_the_reference(rounding, order):
    # Without momentum and with a power of two as learning rate, the FP32 result is exact whatever the order.
    rule, seed = Rule("sgd", 0.5, 0.0), 2**63 + 9
    # The last kernel in both layouts.
    made, grads = ([*ts, ts[-1].contiguous()] for ts in (tensors(), tensors(seed=1)))
    master_spec, weight_spec = Rounding("fp16", rounding), Rounding("e5m2", rounding)
    parameters = []
    for i, (m, g) in enumerate(zip(made, grads, strict=True)):
        weight = torch.empty_like(m, dtype=torch.float8_e5m2)
        # The last ones keep FP16 values in FP32 tensors, as normalization parameters do.
        master = m.half() if i < 3 else m.half().float()
        parameters.append(Parameter(master, g, (), 2**64 - 1 - i, weight, i, order=order))

    def rounded(x, format, stream):
        return reference.round_to_format(x.cpu(), Rounding(format, rounding), RandomBits(seed, stream, order))

    expected = [rounded(p.master.float() - 0.5 * p.grad, FP16, p.master_stream) for p in parameters]
    update(parameters, rule, 1, master_spec, weight_spec, gradient_control(parameters), seed=seed)
    for p, master in zip(parameters, expected, strict=True):
        assert_close(p.master, master)
        assert_close(p.weight, rounded(master, E5M2, p.weight_stream))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_gradient_stops_every_tensor(bad):
    masters, grads = tensors(), tensors(seed=1)
    grads[1][0] = bad
    before = [m.clone() for m in masters]
    parameters = [Parameter(m, g, (torch.zeros_like(m),)) for m, g in zip(masters, grads, strict=True)]
    control = gradient_control(parameters)
    update(parameters, RULES["sgd"], 1, EXACT, FP8, control)
    assert control[0] == 1
    for m, b in zip(masters, before, strict=True):
        assert_close(m, b)
    assert not any(p.state[0].any() for p in parameters)


def test_launches_do_not_grow_with_the_number_of_tensors():
    parameters = [Parameter(torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)) for _ in range(100)]
    with counted_launches() as launches:
        update(parameters, Rule("sgd", 1.0, 0.0), 1, EXACT, FP8, gradient_control(parameters))
    assert launches == {"update": 1, "gradient_norms": 1, "gradient_control": 1}
    assert all((p.master == -1).all() for p in parameters)


def test_tables_of_addresses_are_made_once_for_the_same_tensors():
    masters, grads = tensors(), tensors(seed=1)
    parameters = [Parameter(m, g, (torch.zeros_like(m),)) for m, g in zip(masters, grads, strict=True)]
    made = []
    for step in (1, 2, 3):
        before = table_of.cache_info().misses
        update(parameters, RULES["sgd"], step, EXACT, FP8, gradient_control(parameters), seed=step)
        made.append(table_of.cache_info().misses - before)
    assert made[0] > 0
    assert made[1:] == [0, 0]
    grads[0] = grads[0].clone()
    gradient_control([replace(parameters[0], grad=grads[0])])
    assert table_of.cache_info().misses > before


def group(rule):
    """Arguments of the operators for a group of FP16 masters."""
    masters, grads = [t.half() for t in tensors()[:3]], tensors(seed=1)[:3]
    states = [torch.zeros_like(g) for g in grads for _ in range(states_of(rule))]
    numbers = [rule.lr, rule.momentum, rule.beta2, rule.eps, rule.weight_decay]
    roundings = (spell(Rounding(FP16, "stochastic")), spell(FP8))
    control = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, device=DEVICE)
    streams = [1, 2, 3, 4, -5, 6]
    rest = (rule.name, numbers, rule.nesterov, 2, *roundings, 8.0, -7, [False, True, False])
    return grads, masters, states, [], [], control, streams, *rest


def test_operators_hold_what_torch_asks_of_them():
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    grads, masters, *rest = group(RULES["adam"])
    torch.library.opcheck(engine.control_of, (grads, 8.0, 2.0), test_utils=utilities)
    torch.library.opcheck(engine.update_group, (grads, masters, *rest), test_utils=utilities)


def test_a_compiled_graph_holds_the_update():
    def step(grads, masters, *rest):
        torch.ops.fp8repro.update(grads, masters, *rest)
        return torch.ops.fp8repro.gradient_control(grads, 8.0, None), masters[0] + 1

    plain, compiled = group(RULES["adam"]), group(RULES["adam"])
    expected = step(*plain)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    for a, b in zip(plain[1] + plain[2], compiled[1] + compiled[2], strict=True):
        assert_close(a, b)
    assert plain[2][0].any()


@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_a_norm_whose_square_is_beyond_fp32_clips_and_does_not_stop(clip_norm):
    master = torch.ones(3000, device=DEVICE)
    grad = torch.full_like(master, 3e25)
    parameter = Parameter(master, grad)
    control = gradient_control([parameter], 2.0, clip_norm)
    norm = 1.5e25 * math.sqrt(3000)
    assert control[0] == 0
    assert float(control[2]) == pytest.approx(norm, rel=1e-6)
    assert float(control[1]) == pytest.approx(1.0 if clip_norm is None else clip_norm / norm, rel=1e-6)
    if clip_norm is not None:
        update([parameter], Rule("sgd", 0.5, 0.0), 1, EXACT, FP8, control, 2.0)
        assert_close(master, torch.full_like(master, 1 - 0.5 * clip_norm / math.sqrt(3000)), 1e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_result_before_rounding_is_given_and_changes_no_byte(name):
    rule = RULES[name]
    found = []
    for measured in (False, True):
        masters, grads = [t.half().float() for t in tensors()], tensors(seed=1)
        before = [m.clone() for m in masters]
        updated = [torch.full_like(m, -7.0) for m in masters]
        parameters = [
            Parameter(m, g, tuple(torch.zeros_like(m) for _ in range(states_of(rule))), updated=u if measured else None)
            for m, g, u in zip(masters, grads, updated, strict=True)
        ]
        update(parameters, rule, 1, Rounding("fp16", "stochastic"), FP8, gradient_control(parameters), seed=3)
        found.append(masters)
    for m, n in zip(*found, strict=True):
        assert_close(m, n)
    exact = [nn.Parameter(b) for b in before]
    for p, g in zip(exact, grads, strict=True):
        p.grad = g
    torch_optimizer(rule, exact).step()
    for master, result, p in zip(masters, updated, exact, strict=True):
        assert_close(result, p, 1e-6, scale=1 + 10 * p.abs())
        rounded = [reference.round_to_format(result.cpu(), Rounding(FP16, r)) for r in ("nearest", "toward_zero")]
        assert (master.cpu() != result.cpu()).any()
        assert_close(master, rounded[1], 2.0**-9, scale=rounded[0].abs().clamp_min(2.0**-14))


@pytest.mark.skipif(not INTERPRETED, reason="the same on a GPU, where other tests train")
def test_a_measured_step_is_the_unmeasured_one_with_real_products():
    recipe = replace(load_recipe("fp8"), exempt=())
    weights, rows = [], []
    for every in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 3))
        inject(model, recipe, StepContext(seed=4, telemetry=Telemetry(every)), "triton")
        masters = MasterWeights(model, torch.optim.Adam(model.parameters(), 1e-2), recipe)
        for step in range(2):
            model.fp8_context.begin(step)
            model.fp8_context.telemetry.begin(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * 64
            with counted_launches() as launches:
                assert masters.step(64.0, clip_norm=1.0)
            assert launches["update"] > 0
        weights.append([p.detach().clone() for p in model.parameters()])
        rows.append([row for row in model.fp8_context.telemetry.rows() if row["role"] == "master"])
    for a, b in zip(*weights, strict=True):
        assert_close(a, b)
    assert rows[0] == []
    assert [row["nonzero"] for row in rows[1]] == [16 * 32, 32, 32 * 3, 3]


class Product(nn.Module):
    """Two FP8 layers in channels_last and a normalization: masters in FP16 and in FP32, two memory layouts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-4, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fused_step_is_the_masters_step(name, rounding):
    recipe = replace(load_recipe("fp8"), master=Rounding("fp16", rounding), exempt=())
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Product().to(DEVICE, memory_format=torch.channels_last)
        inject(model, recipe, StepContext(seed=4), "emulate")
        optimizer = OPTIMIZERS[name](model.parameters())
        models.append((model, MasterWeights(model, optimizer, recipe), optimizer))
    (model, masters, optimizer), (fused, fused_masters, fused_optimizer) = models
    parameters = dict(fused.named_parameters())
    assert unsupported(fused_optimizer) is None
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), fused.parameters(), strict=True):
            grad = torch.randn(p.shape, generator=generator).to(DEVICE) * 64
            p.grad, q.grad = torch.empty_like(p.data, dtype=torch.float32).copy_(grad), grad.clone()
        model.fp8_context.begin(step)
        fused.fp8_context.begin(step)
        assert masters.step(64.0, clip_norm=3.0)
        given = (recipe.master, fused.fp8_context, 64.0, 3.0, fused_masters.orders)
        norm = fused_step(engine, parameters, fused_optimizer, *given)
        assert norm == pytest.approx(masters.grad_norm, rel=1e-5)
    for key, p in model.named_parameters():
        q = parameters[key].data
        assert (p.dtype, p.stride()) == (q.dtype, q.stride())
        # A last bit of FP32 may fall on the other side of a rounding.
        assert_close(q, p, 2.0**-10, scale=p.abs().clamp_min(2.0**-14))
    ours, torchs = fused_optimizer.state_dict(), optimizer.state_dict()
    assert {k: set(v) for k, v in ours["state"].items()} == {k: set(v) for k, v in torchs["state"].items() if v}
    fused_optimizer.load_state_dict(ours)


def test_a_state_that_torch_made_fits_a_master_of_one_channel():
    """Its strides differ in the dimension of one channel alone, which nobody walks."""
    master, state = (torch.zeros(72, device=DEVICE).as_strided((8, 1, 3, 3), (9, s, 3, 1)) for s in (1, 9))
    assert state.stride() != master.stride()
    parameter = Parameter(master, torch.ones_like(master), (state,))
    update([parameter], RULES["sgd"], 2, EXACT, FP8, gradient_control([parameter]))
    assert bool((state == 1).all())


def test_fused_step_that_is_skipped_leaves_no_trace():
    model = nn.Linear(3, 2).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad, model.bias.grad = torch.full((2, 3), float("nan"), device=DEVICE), torch.ones(2, device=DEVICE)
    before = [p.detach().clone() for p in model.parameters()]
    norm = fused_step(engine, dict(model.named_parameters()), optimizer, Rounding("fp16"), StepContext(), 2.0)
    assert norm is None
    for p, b in zip(model.parameters(), before, strict=True):
        assert_close(p, b)
    assert not optimizer.state_dict()["state"]


def test_optimizers_without_a_fused_form():
    parameters = [nn.Parameter(torch.zeros(1))]
    assert unsupported(torch.optim.RMSprop(parameters)) == "RMSprop has no fused form"
    assert unsupported(torch.optim.Adam(parameters, amsgrad=True)) == "amsgrad has no fused form"
    assert unsupported(torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.5)) == "dampening has no fused form"


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("master", {"master": torch.zeros(4, 4, dtype=torch.bfloat16)}),
        ("master", {"master": torch.zeros(4, 8, device=DEVICE)[:, ::2]}),
        ("grad", {"grad": torch.zeros(4, 4).t()[:3]}),
        ("grad", {"grad": torch.zeros(4, 4, dtype=torch.float16)}),
        ("grad", {"grad": torch.zeros(4, 4, dtype=torch.float8_e5m2)}),
        ("state", {"state": ()}),
        ("weight", {"weight": torch.zeros(4, 4)}),
    ],
)
def test_bad_argument_is_named(argument, change):
    given = {"master": torch.zeros(4, 4), "grad": torch.zeros(4, 4), "state": (torch.zeros(4, 4),), **change}
    moved = {k: tuple(t.to(DEVICE) for t in v) if isinstance(v, tuple) else v.to(DEVICE) for k, v in given.items()}
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        update([Parameter(**moved)], RULES["sgd"], 1, EXACT, FP8, torch.zeros(3, dtype=torch.float64, device=DEVICE))
