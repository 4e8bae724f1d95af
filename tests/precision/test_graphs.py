"""A training step as a CUDA graph: its random bits are those of the eager step. Without a GPU, a stand-in replays."""

from dataclasses import replace

import pytest
import torch
from replaying import DEVICE, SCALE, Trained, assert_same, draw, linear, resnet, stand_in_for_a_gpu
from torch import nn
from training_tools import tiny_config, untimed, use_tiny_network, write_images

from fp8repro.engines import quantizer
from fp8repro.kernels.quantize.launch import round_into
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.numerics.streams import StreamTable
from fp8repro.precision import graphs
from fp8repro.precision.context import StepContext, stream_id
from fp8repro.precision.graphs import GraphedStep, why_not_graphed
from fp8repro.precision.injection import inject, sites
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import DataConfig, LossScalingConfig
from fp8repro.training.loop import train

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
STAND_IN = pytest.mark.skipif(not INTERPRETED, reason="stands in for the graph that a GPU has")


@pytest.fixture
def stand_in(monkeypatch):
    stand_in_for_a_gpu(monkeypatch.setattr)


def test_slots_hold_the_streams_of_the_step():
    context = StepContext(seed=1, rank=2)
    slots = StreamTable(DEVICE, capacity=3)
    operands = [("a", 0, "output_error", "error"), ("a", 1, "output_error", "error"), ("b", 0, "weight", "weight")]
    with context.streams_in_memory(slots):
        given = [context.stream(*operand) for operand in (*operands, operands[0])]
        with pytest.raises(ValueError, match="capacity: got 3 slots"):
            context.stream("c", 0, "input", "activation")
    assert given[3] == given[0]
    assert len(slots) >= 3
    assert context.stream(*operands[0]) == stream_id(0, 0, *operands[0], 2)


@pytest.mark.parametrize("moment", [(0, 0), (7, 0), (7, 3), (10**6, 1)])
def test_refreshed_slots_are_the_eager_streams_of_any_step(moment):
    context = StepContext(seed=1, rank=2)
    slots = StreamTable(DEVICE)
    operands = [(f"layer{i}", i % 3, "output_error", "error") for i in range(40)] + [("b", 0, "weight", "weight")]
    with context.streams_in_memory(slots):
        given = [context.stream(*operand) for operand in operands]
    for step, micro_step in ((5, 1), moment):
        context.begin(step, micro_step)
        slots.refresh(context.stream_number)
        words = [[int(word) & 0xFFFFFFFF for word in slot.words()] for slot in given]
        assert [low | high << 32 for low, high in words] == [context.stream(*operand) for operand in operands]


def test_a_span_of_slots_is_one_tensor_of_streams():
    slots = StreamTable(DEVICE, capacity=5)
    first = slots.slot(("a", 0, "x", "error"))
    names = [(f"w{i}", 0, "master", "master") for i in range(3)]
    span = slots.span(names)
    slots.refresh(lambda name, *_: 2**64 - 1 if name == "a" else 2**40 + int(name[1:]))
    assert span.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
    assert [int(word) for word in first.words()] == [-1, -1]
    with pytest.raises(ValueError, match=r"^names: got .*'w1'.*, which has a slot, expected operands without one"):
        slots.span([("new", 0, "master", "master"), names[1]])


@pytest.mark.parametrize("layout", ["flat", "columns", "strided"])
def test_a_kernel_draws_the_same_bits_from_memory_as_by_value(layout):
    x = draw(4, 12, 6, 7).to(DEVICE)
    x = {"flat": x, "columns": x[:, :, :4].contiguous(memory_format=torch.channels_last), "strided": x[:, ::2]}[layout]
    context, slots = StepContext(), StreamTable(DEVICE)
    with context.streams_in_memory(slots):
        slot = context.stream("layer", 0, "output_error", "error")
    for step in (0, 1, 12345):
        context.begin(step)
        slots.refresh(context.stream_number)
        codes = [torch.empty_like(x, dtype=torch.float8_e5m2) for _ in range(2)]
        for out, stream in zip(codes, (slot, context.stream("layer", 0, "output_error", "error")), strict=True):
            round_into(x, Rounding(quantizer.get_format("e5m2"), "stochastic"), RandomBits(9, stream), None, out, None)
        assert torch.equal(*(c.view(torch.uint8) for c in codes))


@STAND_IN
@pytest.mark.parametrize(("build", "recipe"), [(resnet, "fp8_stochastic"), (linear, "fp8"), (linear, "fp8_stochastic")])
def test_replayed_steps_have_the_bytes_of_eager_ones(build, recipe, stand_in):
    eager, graphed = Trained(build, recipe), Trained(build, recipe)
    step_of = GraphedStep(graphed.model, graphed.loss_of, graphed.batch(0))
    for name, value in eager.model.state_dict().items():
        assert torch.equal(graphed.model.state_dict()[name], value), name
    for step in (0, 5):
        seen = []
        for trained, run in ((eager, eager.eager), (graphed, lambda batch: step_of(batch, SCALE))):
            operands = []
            observer = lambda layer, kind, given, kept=operands: kept.extend((layer, kind, o.codes) for o in given)  # noqa: E731
            trained.optimizer.zero_grad()
            trained.context.begin(step)
            with trained.context.observe(observer):
                loss, figures = run(trained.batch(step))
            seen.append((operands, loss, figures, trained.gradients()))
            assert trained.masters.step(SCALE)
        (expected, *results), (given, *replayed) = seen
        assert len(given) == len(expected) > 6
        for (*place, codes), (*expected_place, expected_codes) in zip(given, expected, strict=True):
            assert place == expected_place
            assert torch.equal(codes.float(), expected_codes.float()), place
        assert torch.equal(replayed[0], results[0])
        assert_same(replayed[1], results[1])
        assert_same(replayed[2], results[2])
        assert_same(graphed.model.state_dict(), eager.model.state_dict())


@STAND_IN
def test_graphed_and_eager_steps_take_turns(stand_in):
    """Micro-steps, another batch size, a measured step: neither finds the other's rounded weights or gradients."""
    eager, mixed = (Trained(linear, "fp8_stochastic", telemetry=3) for _ in range(2))
    mixed.context.begin(0)
    step_of = GraphedStep(mixed.model, mixed.loss_of, mixed.batch(0))
    for step in range(5):
        for trained in (eager, mixed):
            trained.optimizer.zero_grad()
            trained.context.telemetry.begin(step)
            for micro_step in range(3):
                trained.context.begin(step, micro_step)
                batch = trained.batch(10 * step + micro_step)
                if trained is mixed and why(mixed) is None and micro_step != 1:
                    step_of(batch, SCALE)
                else:
                    trained.eager(batch)
        assert_same(mixed.gradients(), eager.gradients())
        assert all(trained.masters.step(SCALE) for trained in (eager, mixed))
        assert_same(mixed.model.state_dict(), eager.model.state_dict())
    # No weight that a graph rounded, in its own memory, is left to an eager step.
    assert all(site._kept is None or site._kept.scope is None for site in sites(mixed.model).values())


def why(trained):
    return graphs.why_not_graphed(trained.model)


def test_why_a_step_cannot_be_graphed(monkeypatch):
    assert why_not_graphed(nn.Linear(2, 2)) == "no layer of the model is converted by a recipe"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(DEVICE)
    inject(model, "fp8", backend="triton")
    assert why_not_graphed(model) == (
        None if torch.cuda.is_available() else "the model is on cpu, and CUDA graphs need a GPU"
    )
    model.append(nn.BatchNorm1d(4, momentum=None))
    assert why_not_graphed(model) == "2: normalization without a momentum reads its count of batches on the host"
    model.fp8_context.telemetry.active = True
    assert why_not_graphed(model) == "telemetry measures the step"
    with pytest.raises(ValueError, match=r"^model: got one whose step cannot be graphed \(telemetry measures"):
        GraphedStep(model, lambda x: (model(x).sum(), {}), [draw(2, 4)])
    scaled = replace(load_recipe("fp8"), exempt=(), error=replace(load_recipe("fp8").error, scaling="tensor"))
    for recipe, backend, reason in (
        (scaled, "triton", "0: the scale of role error (scaling: tensor) is read by the host"),
        (load_recipe("fp8"), "emulate", "products by backend=emulate"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(DEVICE)
        inject(model, recipe, backend=backend)
        assert why_not_graphed(model).startswith(reason)


@STAND_IN
def test_what_a_graphed_step_refuses(stand_in):
    trained = Trained(linear)
    step_of = GraphedStep(trained.model, trained.loss_of, trained.batch(0))
    x, labels = trained.batch(0)
    trained.context.begin(1)
    step_of((x, labels))
    with pytest.raises(RuntimeError, match=r"^context\.begin: got no call since the last step"):
        step_of((x, labels))
    trained.context.begin(2)
    for batch in ((x[:1], labels), (x, labels.int()), (x,)):
        assert not step_of.fits(batch)
        with pytest.raises(ValueError, match=r"^batch: got torch\.float32 .*, expected torch\.float32 \(6, 24\)"):
            step_of(batch)
    trained.context.telemetry.active = True
    assert not step_of.fits((x, labels))
    trained.context.telemetry.active = False
    trained.model.eval()
    assert not step_of.fits((x, labels))
    trained.model.train()
    assert step_of.fits((x, labels))
    trained.model[0].bias.data = trained.model[0].bias.data.clone()
    assert not step_of.fits((x, labels))


def trained_both_ways(tmp_path, steps=5, **settings):
    """Summaries and rows of a run with graphs and one without, both on batches of 5 and 6 images."""
    options = {"epochs": 3, "max_steps": steps, "batch_size": 12, "micro_steps": 2, "telemetry_every": 3}
    data = DataConfig("image_folder", str(write_images(tmp_path / "images", count=22)), 16)
    results = []
    for choice in ("auto", "off"):
        config = tiny_config(tmp_path / choice, "fp8", LossScalingConfig("constant", scale=1000), data, **options)
        summary = train(replace(config, graphs=choice, backend="triton", **settings))
        results.append((summary, untimed(tmp_path / choice)))
    return results


@STAND_IN
def test_a_run_with_graphs_is_the_run_without(tmp_path, stand_in, monkeypatch):
    use_tiny_network(monkeypatch)
    taken = []
    call = GraphedStep.__call__
    monkeypatch.setattr(
        GraphedStep, "__call__", lambda self, *given: (taken.append(self.context.step), call(self, *given))[1]
    )
    (graphed, given), (eager, expected) = trained_both_ways(tmp_path)
    assert given == expected
    # Not the first step, nor those that telemetry measures.
    assert taken == [1, 1, 2, 2, 4, 4]
    assert graphed["graphs"] == "replayed for batches of 5, 6"
    assert eager["graphs"] == "graphs=off"


@STAND_IN
def test_a_step_that_cannot_be_captured_is_left_to_the_loop(tmp_path, stand_in, monkeypatch):
    def capture(run, device, pool):
        run()
        raise torch.OutOfMemoryError("no memory\nat all")

    use_tiny_network(monkeypatch)
    monkeypatch.setattr(graphs, "capture", capture)
    (graphed, given), (_, expected) = trained_both_ways(tmp_path, steps=2)
    assert given == expected
    assert graphed["graphs"] == "a step could not be captured (no memory)"


@NEEDS_GPU
def test_a_run_on_a_gpu_with_graphs_is_the_run_without(tmp_path, monkeypatch):
    monkeypatch.setattr("fp8repro.training.tasks.classification.make_resnet", lambda *_, **__: resnet()[0])
    (graphed, given), (_, expected) = trained_both_ways(tmp_path, device="cuda")
    assert given == expected
    assert graphed["graphs"] == "replayed for batches of 5, 6"


@NEEDS_GPU
def test_dropout_in_a_cuda_graph_follows_the_seed_of_the_step():
    def build():
        return nn.Sequential(nn.Linear(24, 40), nn.Dropout(0.5), nn.Linear(40, 16), nn.Linear(16, 5)), (6, 24)

    eager, graphed = Trained(build), Trained(build)
    step_of = GraphedStep(graphed.model, graphed.loss_of, graphed.batch(0))
    for step in (0, 1):
        for trained, run in ((eager, eager.eager), (graphed, lambda batch: step_of(batch, SCALE))):
            trained.optimizer.zero_grad()
            trained.context.begin(step)
            torch.cuda.manual_seed(step)
            run(trained.batch(step))
        assert_same(graphed.gradients(), eager.gradients())


@NEEDS_GPU
@pytest.mark.parametrize("recipe", ["fp8", "fp8_stochastic"])
@pytest.mark.parametrize("build", [resnet, linear])
def test_a_cuda_graph_trains_to_the_bits_of_eager_steps(build, recipe):
    """To the bit: sums have a fixed order, and no operation of these models adds by atomics."""
    eager, graphed = Trained(build, recipe), Trained(build, recipe)
    # One eager step first, as a run takes it.
    for trained in (eager, graphed):
        trained.context.begin(0)
        trained.eager(trained.batch(0))
        assert trained.masters.step(SCALE)
        trained.optimizer.zero_grad()
    before = {name: value.clone() for name, value in graphed.model.state_dict().items()}
    random = torch.cuda.get_rng_state()
    step_of = GraphedStep(graphed.model, graphed.loss_of, graphed.batch(0))
    assert_same(graphed.model.state_dict(), before)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert all(p.grad is None for p in graphed.model.parameters())
    for step in (1, 2, 3):
        results = []
        for trained, run in ((eager, eager.eager), (graphed, lambda batch: step_of(batch, SCALE))):
            trained.context.begin(step)
            results.append((*run(trained.batch(step)), trained.gradients()))
            assert trained.masters.step(SCALE)
            trained.optimizer.zero_grad()
        (loss, figures, gradients), (given_loss, given_figures, given) = results
        assert torch.equal(given_loss, loss)
        assert_same(given_figures, figures)
        assert_same(given, gradients)
        assert_same(graphed.model.state_dict(), eager.model.state_dict())


@NEEDS_GPU
def test_cuda_graphs_share_memory_and_take_turns_with_eager_steps():
    eager, mixed = (Trained(resnet, "fp8_stochastic") for _ in range(2))
    steps = {}
    for step in range(4):
        for trained in (eager, mixed):
            trained.optimizer.zero_grad()
            for micro_step in range(3):
                trained.context.begin(step, micro_step)
                x, labels = trained.batch(10 * step + micro_step)
                # Batches of two sizes, and one in three is eager.
                batch = (x, labels) if micro_step < 2 else (x[:, :, :8], labels)
                if trained is eager or (step + micro_step) % 3 == 0:
                    trained.eager(batch)
                    continue
                shape = batch[0].shape
                if shape not in steps:
                    beside = next(iter(steps.values()), None)
                    steps[shape] = GraphedStep(mixed.model, mixed.loss_of, batch, beside)
                steps[shape](batch, SCALE)
        assert_same(mixed.gradients(), eager.gradients())
        assert all(trained.masters.step(SCALE) for trained in (eager, mixed))
        assert_same(mixed.model.state_dict(), eager.model.state_dict())
    assert len(steps) == 2
