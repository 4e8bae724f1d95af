"""Roundings of many tensors in one launch, against the reference: the bytes of each tensor's own rounding."""

from dataclasses import replace

import pytest
import torch
from numeric import assert_close

from fp8repro.kernels.quantize import grouped
from fp8repro.kernels.quantize.grouped import Job, prepare
from fp8repro.kernels.shared.launch import counted_launches
from fp8repro.numerics import reference
from fp8repro.numerics.rounding import ORDERS, RandomBits, Rounding
from fp8repro.numerics.streams import StreamTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = 2**63 + 9


def tensors(dtype):
    """Magnitudes from underflow to overflow, special values; shapes that fill no block, and two layouts of a kernel."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in [(300, 7), (1,), (40_000,), (0, 4), (16, 6, 3, 3), (8, 24, 1, 1)]:
        scale = 10.0 ** (torch.rand(shape, generator=generator) * 12 - 6)
        made.append((torch.randn(shape, generator=generator) * scale).clamp(-6e4, 6e4))
    made[2][:5] = torch.tensor([float("nan"), -float("inf"), 0.0, -0.0, 65_000.0])
    made += [t.to(memory_format=torch.channels_last) for t in made[-2:]]
    return [t.to(DEVICE, dtype) for t in made]


def empty_job(x, how, slots, name, order="row_major", both=False):
    codes = torch.empty_like(x, dtype=how.format.dtype)
    transposed = torch.empty(x.t().shape, dtype=codes.dtype, device=DEVICE) if both else None
    return Job(x, how, codes, transposed, slots.slot((name, 0, "weight", "weight")), order)


def number(step):
    """Streams of a step as a run names them: any function of the operand's name."""
    return lambda name, *_: (2**64 - 1 - step) ^ int(name)


def assert_reference(jobs, step):
    for i, job in enumerate(jobs):
        bits = RandomBits(SEED, number(step)(str(i)), job.order)
        expected = reference.round_to_format(job.x.cpu().float(), job.how, bits)
        assert_close(job.codes, expected)
        if job.transposed is not None:
            assert torch.equal(job.transposed.view(torch.uint8), job.codes.view(torch.uint8).t())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_are_those_of_single_roundings(rounding, order, dtype):
    slots = StreamTable(DEVICE)
    hows = [Rounding("e5m2", rounding), Rounding("e4m3", rounding), Rounding("fp16", rounding)]
    pairs = [(x, how) for how in hows for x in tensors(dtype)]
    jobs = [empty_job(x, how, slots, str(i), order) for i, (x, how) in enumerate(pairs)]
    launches = prepare(jobs, SEED)
    # Formats apart, counts that are no multiples of 16, and layouts where elements do not count as they lie.
    assert len(launches) == 3 * (2 + (rounding == "stochastic"))
    # The same launches find the streams of another step, and weights that were written to since.
    for step in (0, 7):
        slots.refresh(number(step))
        with counted_launches() as counted:
            for launch in launches:
                launch.run()
        assert counted == {"round_group": len(launches)}
        assert_reference(jobs, step)
        for job in jobs:
            job.x.mul_(0.75)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_matrices_are_written_in_both_layouts(rounding, dtype):
    slots, how = StreamTable(DEVICE), Rounding("e5m2", rounding)
    shapes = [(64, 40), (4, 8), (300, 520), (5, 8), (8, 9), (7, 11), (1, 1)]
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    jobs = [empty_job(x, how, slots, str(i), both=True) for i, x in enumerate(made)]
    # One whose integers would not be aligned.
    jobs[0] = replace(
        jobs[0], transposed=torch.empty(64 * 40 + 1, dtype=torch.float8_e5m2, device=DEVICE)[1:].view(40, 64)
    )
    launches = prepare(jobs, SEED)
    # Rows of which four codes share an integer, and whole Philox blocks in a row: each of four kinds.
    assert len(launches) == 4
    slots.refresh(number(3))
    for launch in launches:
        launch.run()
    assert_reference(jobs, 3)


def test_launches_do_not_grow_with_the_number_of_tensors_and_tables_are_made_once():
    slots, how = StreamTable(DEVICE), Rounding("e5m2")
    jobs = [empty_job(torch.full((5,), float(i), device=DEVICE), how, slots, str(i)) for i in range(100)]
    (launch,) = prepare(jobs, 0)
    assert prepare(jobs, 0)[0].table is launch.table
    launch.run()
    assert [float(job.codes[0].float()) for job in jobs[:5]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.zeros(4, 4, dtype=torch.bfloat16)}),
        ("x", {"x": torch.zeros(4, 8)[:, ::2]}),
        ("how", {"how": Rounding("fp32")}),
        ("codes", {"codes": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}),
        ("codes", {"codes": torch.zeros(4, 4, dtype=torch.float8_e5m2).t()}),
        ("transposed", {"transposed": torch.zeros(4, 5, dtype=torch.float8_e5m2)}),
        ("stream", {"how": Rounding("e5m2", "stochastic")}),
    ],
)
def test_bad_argument_is_named(argument, change):
    given = {"x": torch.zeros(4, 4), "how": Rounding("e5m2"), "codes": torch.zeros(4, 4, dtype=torch.float8_e5m2)}
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (given | change).items()}
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        prepare([Job(**given)], 0)


def test_what_a_job_may_have():
    assert grouped.takes(torch.zeros(3, 4).t()) is True
    assert not any(
        map(grouped.takes, (torch.zeros(4, 4).bfloat16(), torch.zeros(4, 8)[:, ::2], torch.zeros(4, 8)[:2, :4]))
    )
