"""Translation with replayed steps: a graph a shape, and the bytes of the run without. What replays is a stand-in."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from replaying import SIZES, Small, assert_same, stand_in_for_a_gpu, translation_config, write_text
from torch import nn
from training_tools import untimed

from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.paper.run_folder import HYPOTHESES
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, GraphedUpdate
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe
from fp8repro.training import replays
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint
from fp8repro.training.distributed import World
from fp8repro.training.loop import train
from fp8repro.training.tasks import make_task, translation

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for the graph that a GPU has")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def stand_in(monkeypatch):
    stand_in_for_a_gpu(monkeypatch.setattr)


def final_state(run_dir):
    """Weights, optimizer and loss scale."""
    state = read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    optimizer = {f"{i}.{name}": v for i, found in state["optimizer"]["state"].items() for name, v in found.items()}
    return {**state["model"], **optimizer}, state["scaler"], state["step"]


def trained_both_ways(text, folder, steps, model="transformer"):
    """A run with graphs and one without; both are stopped after half of the steps, and resumed."""
    found = {}
    for graphs in ("auto", "off"):
        whole = replace(translation_config(text, folder / graphs, model, max_steps=steps), graphs=graphs)
        found[graphs] = [train(replace(whole, trainer=replace(whole.trainer, max_steps=steps // 2)))]
        found[graphs].append(train(replace(whole, resume="auto")))
    (given, *others), (expected, *expected_others) = final_state(folder / "auto"), final_state(folder / "off")
    assert others == expected_others
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert untimed(folder / "auto", "train") == untimed(folder / "off", "train")
    assert untimed(folder / "auto", "eval") == untimed(folder / "off", "eval")
    assert (folder / "auto" / HYPOTHESES).read_text() == (folder / "off" / HYPOTHESES).read_text()
    assert found["off"][-1]["decode_graphs"] == "graphs=off"
    return found["auto"], found["off"]


def counting(monkeypatch):
    """The graphs that are captured, shapes of the sources of replayed passes, and steps whose update was replayed."""
    graphs, passes, updates = [], [], []
    init, call, update = GraphedStep.__init__, GraphedStep.__call__, GraphedUpdate.__call__
    monkeypatch.setattr(GraphedStep, "__init__", lambda s, *a: (init(s, *a), graphs.append(s))[0])
    monkeypatch.setattr(GraphedStep, "__call__", lambda s, b, f: (passes.append(b[0].shape), call(s, b, f))[1])
    monkeypatch.setattr(GraphedUpdate, "__call__", lambda s, *a: (updates.append(s._context.step), update(s, *a))[1])
    return graphs, passes, updates


def by_process(graphs):
    """Graphs that share memory, together."""
    return [list(group) for _, group in groupby(graphs, lambda graph: id(graph._shared))]


def test_a_run_with_a_graph_a_shape_is_the_run_without(text, tmp_path, stand_in, monkeypatch):
    monkeypatch.setitem(translation.MODELS, "transformer", Small)
    graphs, passes, updates = counting(monkeypatch)
    replayed, eager = trained_both_ways(text, tmp_path, 6)
    assert 0 < eager[-1]["skipped_steps"] < 4
    # Not the first step of a process.
    assert len(passes) == 6 - 2
    assert len(set(passes)) > 2
    assert updates
    for process, summary in zip(by_process(graphs), replayed, strict=True):
        assert summary["graphs"].startswith("replayed for ")
        sizes = [sum(t.numel() for t in graph._inputs) for graph in process]
        # The largest batch first, whichever was met.
        assert sizes[0] == max(sizes) > min(sizes)
        for gradients in zip(*(graph._gradients for graph in process), strict=True):
            assert len({g.data_ptr() for g in gradients}) == 1
    assert eager[-1]["graphs"] == "graphs=off"
    refused = "a search could not be captured (Small has no decoder of a fixed size)"
    assert replayed[-1]["decode_graphs"] == refused


@pytest.mark.parametrize(("name", "lengths"), [("transformer", (2, 2, 2)), ("gnmt", (2, 1, 1))])
def test_a_replay_of_fused_layers_is_the_eager_step(name, lengths, stand_in):
    """Of other sentences than those that were captured, with other padding, streams and dropout."""
    torch.manual_seed(0)
    model, recipe, context = translation.MODELS[name](12, 1, 2, **SIZES[name]), load_recipe("fp8"), StepContext(seed=3)
    inject(model, recipe, context, "triton")
    MasterWeights(model, torch.optim.SGD(model.parameters(), 0.1), recipe)
    captured, batch = (tuple(torch.randint(4, 12, (2, n)) for n in lengths) for _ in range(2))
    batch[0][1, -1] = 1

    def loss_of(source, decoder_input, target):
        loss, nll = translation.smoothed_loss(model(source, decoder_input), target, 0.1)
        return loss, {"nll": nll.detach()}

    def eager(batch, scale):
        loss, figures = loss_of(*batch)
        (loss * scale).backward()
        return loss.detach(), figures

    # A first pass is watched, and never the one that is captured: a run's first step is eager.
    with torch.no_grad():
        model(*captured[:2])
    found = []
    for step in (GraphedStep(model, loss_of, captured), eager):
        model.zero_grad()
        context.begin(4)
        torch.manual_seed(5)
        loss, figures = step(batch, 64.0)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append({"loss": loss, **figures, **gradients})
    assert_same(*found)


@pytest.mark.long
@pytest.mark.parametrize("name", SIZES)
def test_a_run_of_fused_layers_with_graphs_is_the_run_without(name, text, tmp_path, stand_in, monkeypatch):
    _, passes, updates = counting(monkeypatch)
    replayed, eager = trained_both_ways(text, tmp_path, 6, name)
    assert replayed[-1]["decode_graphs"] == "replayed for 1 shapes of batches"
    assert len(passes) == 4
    assert len(set(passes)) > 1
    assert updates
    assert 0 < eager[-1]["skipped_steps"] < 6


def test_fairseqs_model_is_not_replayed_and_says_why(text):
    pytest.importorskip("fairseq")
    settings = translation_config(text, "unused", "fairseq_transformer")
    task = make_task(settings, World())
    replaying = replays.Replays("auto", load_recipe("fp8"), World(), task, nn.Linear(1, 1))
    assert replaying.summary() == "fairseq's model asks the device whether a batch is padded"
