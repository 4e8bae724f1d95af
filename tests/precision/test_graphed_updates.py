"""Weights rounded and masters updated in few launches that a graph can repeat: the bytes of the step without."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from replaying import DEVICE, SCALE, Trained, assert_same, linear, stand_in_for_a_gpu
from torch import nn
from training_tools import tiny_config, untimed, use_tiny_network, write_images

from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.graphs import GraphedStep, GraphedUpdate, why_not_graphed
from fp8repro.precision.grouped_weights import GroupedWeights
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import DataConfig, LossScalingConfig
from fp8repro.training.distributed import World
from fp8repro.training.loop import train
from fp8repro.training.replays import Replays
from fp8repro.training.running_statistics import synchronize_normalization

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for the graph that a GPU has")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-4, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.05),
    "adamw": lambda p: torch.optim.AdamW([{"params": list(p)}], 1e-3),
}


@pytest.fixture
def stand_in(monkeypatch):
    stand_in_for_a_gpu(monkeypatch.setattr)


def small():
    """A convolution in channels_last (one not), a normalization and a linear layer with both layouts of its weight."""
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(32, 16), nn.Linear(16, 5)).to(memory_format=torch.channels_last)
    model[4].to(memory_format=torch.contiguous_format)
    return model, (2, 4, 6, 6)


class Quick(Trained):
    """Gradients of all parameters without a product, which the interpreter takes seconds for."""

    def loss_of(self, x, labels):
        values = [p.float() for p in self.model.parameters()]
        return sum((value.square() * x.mean() + value.sin() * x.std()).sum() for value in values), {}


def state_of(trained):
    """Masters, statistics, and the optimizer's own state."""
    found = dict(trained.model.state_dict())
    for i, state in trained.optimizer.state_dict()["state"].items():
        found |= {f"{i}.{name}": value for name, value in state.items() if value is not None}
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_graphed_update_is_the_update(name, stand_in):
    """Through overflows (the first update included), another learning rate and scale, clipping, a loaded state."""
    recipe = replace(load_recipe("fp8_stochastic"), exempt=())
    eager, graphed = (Quick(small, recipe, optimizer=OPTIMIZERS[name]) for _ in range(2))
    step_of = GraphedStep(graphed.model, graphed.loss_of, graphed.batch(0))
    replayed = []
    for step, scale in enumerate((float("1e38"), SCALE, SCALE, float("1e38"), 2 * SCALE, SCALE)):
        clip_norm = (None, 0.5)[step % 2]
        for trained in (eager, graphed):
            trained.optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
            trained.optimizer.zero_grad()
            trained.context.begin(step)
            if step == 4:
                # As a checkpoint that is loaded: other tensors, of the same values.
                trained.masters.load_state_dict(deepcopy(trained.masters.state_dict()))
        applied = []
        eager.eager(eager.batch(step), scale)
        applied.append(eager.masters.step(scale, clip_norm))
        step_of(graphed.batch(step), scale)
        with counted_launches() as launches:
            applied.append(step_of.step(graphed.masters, scale, clip_norm))
        replayed.append(dict(launches))
        assert applied == [scale < 1e38] * 2
        assert graphed.masters.grad_norm == eager.masters.grad_norm
        assert_same(state_of(graphed), state_of(eager))
    # Without the optimizer's state there is no graph; the capture runs once, and again with other tensors. Masters in
    # FP16, of which one counts otherwise than it lies, and in FP32.
    alone = {"gradient_norms": 1, "gradient_control": 1}
    without_state = [alone, alone | {"update": 3}]
    once, captured = alone | {"update": 3}, {"gradient_norms": 2, "gradient_control": 2, "update": 6}
    expected = [*without_state, captured, once, captured, once]
    # Nothing of plain SGD has to be there, and nothing of it is loaded.
    assert replayed == ([captured] + [once] * 5 if name == "plain sgd" else expected)


def test_steps_beside_each_other_share_gradients_weights_and_update(stand_in):
    """Two shapes take turns; one is captured between micro-steps, where its gradients are still to be added to."""
    recipe = replace(load_recipe("fp8_stochastic"), exempt=())
    eager, graphed = (Quick(small, recipe) for _ in range(2))
    steps, updates = {}, []
    for step, sizes in enumerate([(2,), (2, 1), (1,), (2,), (1,)]):
        for trained in (eager, graphed):
            trained.optimizer.zero_grad()
            for micro_step, size in enumerate(sizes):
                batch = tuple(t[:size] for t in trained.batch(10 * step + micro_step))
                trained.context.begin(step, micro_step)
                if trained is eager:
                    trained.eager(batch)
                    continue
                if size not in steps:
                    steps[size] = GraphedStep(graphed.model, graphed.loss_of, batch, steps.get(2))
                steps[size](batch, SCALE)
        assert_same(graphed.gradients(), eager.gradients())
        assert eager.masters.step(SCALE)
        with counted_launches() as launches:
            assert steps[sizes[-1]].step(graphed.masters, SCALE)
        updates.append(launches["gradient_norms"])
        assert_same(state_of(graphed), state_of(eager))
    for a, b in zip(steps[2]._gradients, steps[1]._gradients, strict=True):
        assert a is b
    # Captured once for both, where one pass left all gradients and the momentum was there: at step 2.
    assert updates == [1, 1, 2, 1, 1]
    with pytest.raises(ValueError, match=r"^beside: got a step of another model"):
        GraphedStep(eager.model, eager.loss_of, eager.batch(0), steps[1])


def test_an_update_whose_gradients_lie_otherwise_copies_them(stand_in):
    eager, graphed = Quick(linear), Quick(linear)
    for trained in (eager, graphed):
        trained.context.begin(0)
        trained.eager(trained.batch(0))
        assert trained.masters.step(SCALE)
        weight = trained.model[0].weight
        weight.grad = weight.grad.t().contiguous().t()
    update = GraphedUpdate(graphed.masters, graphed.masters.capturable())
    for scale in (SCALE, 3.0):
        graphed.model[0].weight.grad.mul_(0.5)
        eager.model[0].weight.grad.mul_(0.5)
        assert eager.masters.step(scale)
        assert graphed.masters.step(scale, graph=update)
        assert_same(state_of(graphed), state_of(eager))


def test_what_no_captured_update_fits(stand_in):
    trained = Quick(linear)
    trained.context.begin(0)
    assert trained.masters.capturable() is None
    trained.eager(trained.batch(0))
    # Momentum begins with the first step.
    assert trained.masters.capturable() is None
    assert trained.masters.step(SCALE)
    moving = trained.masters.capturable()
    update = GraphedUpdate(trained.masters, moving)
    assert update.fits(moving)
    group, bias = trained.optimizer.param_groups[0], trained.model[0].bias
    assert not update.fits({name: p for name, p in moving.items() if p is not bias})
    for name, value in (("nesterov", True), ("momentum", 0.0)):
        before, group[name] = group[name], value
        assert not update.fits(moving)
        group[name] = before
    gradient, bias.grad = bias.grad, bias.grad.clone()
    assert not update.fits(moving)
    bias.grad = gradient
    assert update.fits(moving)
    bias.data = bias.data.clone()
    assert not update.fits(moving)
    trained.context.telemetry.active = True
    assert trained.masters.capturable() is None


def test_an_update_that_cannot_be_captured_is_made_without(stand_in, monkeypatch):
    eager, graphed = Quick(small), Quick(small)
    step_of = GraphedStep(graphed.model, graphed.loss_of, graphed.batch(0))

    def capture(run, device, pool):
        run()
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("fp8repro.precision.graphs.capture", capture)
    for step in range(3):
        for trained in (eager, graphed):
            trained.optimizer.zero_grad()
            trained.context.begin(step)
        eager.eager(eager.batch(step))
        step_of(graphed.batch(step), SCALE)
        assert eager.masters.step(SCALE)
        assert step_of.step(graphed.masters, SCALE)
        assert_same(state_of(graphed), state_of(eager))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_weights_rounded_together_have_the_bytes_of_the_layers_own(rounding, stand_in):
    recipe = load_recipe("fp8")
    recipe = replace(recipe, weight=replace(recipe.weight, rounding=rounding))
    alone, together = Trained(small, recipe), Trained(small, recipe)
    weights = GroupedWeights(together.model)
    for step in range(3):
        for trained in (alone, together):
            trained.context.begin(step)
        with together.context.fixed_weights():
            with counted_launches() as launches:
                weights.round()
                weights.round()
            # E5M2 of convolutions, one of which has elements that count otherwise than they lie, and of a linear layer
            # in both layouts; FP16 of the first and the last layer, in one launch.
            assert launches == {"round_group": 2 + (rounding == "stochastic"), "round_group_transposed": 1}
            for name, layer in together.model.named_modules():
                if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                    continue
                both = isinstance(layer, nn.Linear)
                with counted_launches() as launches:
                    given = layer.site.weight(layer.weight, True, both)
                assert not launches
                other = alone.model.get_submodule(name)
                expected = other.site.weight(other.weight, True, both)
                assert (given.fmt, given.values, given.scale) == (expected.fmt, expected.values, expected.scale)
                for a, b in ((given.codes, expected.codes), (given.transposed, expected.transposed)):
                    assert (a is None) == (b is None)
                    assert a is None or (a.stride() == b.stride() and torch.equal(a.float(), b.float()))
        # Whatever writes to a weight, wherever it then lies, is seen by the next step.
        for trained in (alone, together):
            trained.model[3].weight.data.mul_(-0.75)
            trained.model[6].weight.data = trained.model[6].weight.data * 0.5


def test_what_wrote_to_a_weight_between_replays_is_seen(stand_in):
    eager, graphed = Trained(linear), Trained(linear)
    step_of = GraphedStep(graphed.model, graphed.loss_of, graphed.batch(0))
    for step in range(2):
        for trained in (eager, graphed):
            trained.optimizer.zero_grad()
            trained.context.begin(step)
            trained.model[3].weight.data.mul_(-0.75)
        eager.eager(eager.batch(step))
        with counted_launches() as launches:
            step_of(graphed.batch(step), SCALE)
        assert (launches["round_group"], launches["round_group_transposed"]) == (1, 1)
        assert_same(graphed.gradients(), eager.gradients())


def test_layers_round_their_weights_themselves_where_they_must(stand_in):
    trained = Trained(small)
    weights = GroupedWeights(trained.model)

    def launches():
        with counted_launches() as counted:
            weights.round()
        return sum(counted.values())

    trained.context.begin(0)
    assert launches() == 0  # outside of a block
    with trained.context.fixed_weights():
        trained.context.telemetry.active = True
        assert launches() == 0
        trained.context.telemetry.active = False
        trained.model.eval()
        assert launches() == 0
        trained.model.train()
        assert launches() == 3
        assert launches() == 0
    scaled = Rounding("e5m2", scaling="tensor")
    trained.model[4].site.roles["weight"] = scaled
    with trained.context.fixed_weights():
        assert launches() == 3
        assert not trained.model[4].site.has_weight(trained.context.scope)


def trained_both_ways(tmp_path, **settings):
    """Summaries and rows of a run with graphs and one without; the scale overflows at first."""
    options = {"epochs": 1, "batch_size": 4, "telemetry_every": 4}
    data = DataConfig("image_folder", str(write_images(tmp_path / "images", count=20, size=8)), 8)
    results = []
    for choice in ("auto", "off"):
        scaling = LossScalingConfig("dynamic", scale=2.0**22, window=2, factor=2.0**6)
        config = tiny_config(tmp_path / choice, "fp8", scaling, data, **options)
        summary = train(replace(config, graphs=choice, backend="triton", **settings))
        results.append((summary, untimed(tmp_path / choice)))
    return results


def test_a_run_with_graphed_updates_is_the_run_without(tmp_path, stand_in, monkeypatch):
    use_tiny_network(monkeypatch)
    taken = []
    call = GraphedUpdate.__call__
    monkeypatch.setattr(
        GraphedUpdate, "__call__", lambda self, *given: (taken.append(self._context.step), call(self, *given))[1]
    )
    (graphed, given), (_, expected) = trained_both_ways(tmp_path)
    assert given == expected
    assert graphed["skipped_steps"] > 0
    # Not before an update was applied, nor where telemetry measures.
    assert taken
    assert not {0, 4} & set(taken)


def test_processes_replay_steps_without_collectives_inside():
    recipe = load_recipe("fp8")
    task = type("Images", (), {"why_not_replayed": None})()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).to(DEVICE)
    inject(model, recipe, backend="triton")
    device = "the model is on cpu, and CUDA graphs need a GPU"
    for world in (World(), World(1, 2)):
        assert Replays("auto", recipe, world, task, model).why_not == device
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    synchronize_normalization(plain, World(1, 2))
    inject(plain, recipe, backend="triton")
    why = "1: normalization over all processes communicates inside the model"
    assert Replays("auto", recipe, World(1, 2), task, plain).why_not == why
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    inject(torchs, recipe, backend="triton")
    assert why_not_graphed(torchs) == why
