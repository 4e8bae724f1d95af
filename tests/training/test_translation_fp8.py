"""Proof that the recipe is what trains GNMT and the Transformer: every operand of every product of a recorded step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from recording import DTYPES, Recorder, in_set
from torch import Tensor, nn

from fp8repro.engines import products
from fp8repro.models.gnmt import LSTMLayer, gnmt
from fp8repro.models.parts import RepeatedLinear
from fp8repro.models.transformer import transformer
from fp8repro.numerics.recipe import ROLES, Recipe
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject, sites
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.site import Site
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import DecodeConfig
from fp8repro.training.tasks.decode import beam_search
from fp8repro.training.tasks.translation import smoothed_loss

IDENTITY = Rounding(format="fp32")
SCALE = 2.0**13
VOCABULARY = 40
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 1, 1], [12, 13, 14, 2, 1]])
TARGET = torch.tensor([[6, 5, 4, 2], [9, 2, 1, 1], [10, 11, 4, 2]])
DECODER_INPUT = torch.tensor([[2, 6, 5, 4], [2, 9, 1, 1], [2, 10, 11, 4]])
MODELS = ("transformer", "gnmt")
# Torch's other products: a recorded step that holds one has a product that no recipe reaches.
UNREACHED = ("mv", "addmv", "dot", "vdot", "bilinear", "_scaled_dot_product_flash_attention_for_cpu", "lstm")


class StepRecorder(Recorder):
    """Records products, and the names of those that should not be there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unreached: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in UNREACHED:
            self.unreached[func.overloadpacket.__name__] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def build(name: str, recipe: Recipe) -> tuple[nn.Module, MasterWeights]:
    torch.manual_seed(0)
    if name == "gnmt":
        model: nn.Module = gnmt(VOCABULARY, layers=3, width=16, init_range=0.4, dropout=0.1)
    else:
        model = transformer(VOCABULARY, width=16, ffn_width=32, heads=2, encoder_layers=1, decoder_layers=2)
    inject(model, recipe, StepContext(seed=3), backend="emulate")
    return model, MasterWeights(model, torch.optim.Adam(model.parameters(), lr=1e-3), recipe)


def backward(model: nn.Module, step: int, micro_step: int = 0) -> None:
    model.fp8_context.begin(step, micro_step)  # type: ignore[union-attr,operator]
    loss, _ = smoothed_loss(model(SOURCE, DECODER_INPUT), TARGET, 0.1)
    (loss * (SCALE / int(TARGET.ne(1).sum()))).backward()


def output_layer(name: str) -> str:
    return "decoder.classifier" if name == "gnmt" else "decoder.output_projection"


def check_training(name: str, recipe: Recipe) -> None:
    """Record two training steps; every operand, result, gradient and master must lie in its format's set."""
    model, masters = build(name, recipe)
    converted = sites(model)
    fp8 = ("FP8Linear", "FP8RepeatedLinear", "FP8MatMul")
    assert set(converted) == {n for n, m in model.named_modules() if type(m).__name__ in fp8}
    assert not [n for n, m in model.named_modules() if type(m) in (nn.Linear, RepeatedLinear, nn.LSTM)]
    calls: Counter[str] = Counter()
    results: list[tuple[str, Tensor]] = []
    for layer in converted:
        module = model.get_submodule(layer)
        module.register_forward_hook(lambda m, args, out, layer=layer: results.append((layer, out.detach().clone())))
        module.register_full_backward_hook(
            lambda m, grads, outs, layer=layer: results.extend((layer, g.clone()) for g in grads if g is not None)
        )
    for step in range(2):
        results.clear()
        calls.clear()
        model.zero_grad()
        recorder = StepRecorder()
        with recorder, model.fp8_context.observe(lambda layer, product, operands: calls.update([f"{layer} {product}"])):
            backward(model, step)
        assert not recorder.unreached
        # What the layers announce is what torch multiplies.
        assert len(recorder.products) == calls.total()
        fewer = [p for p in recorder.products if not all(in_set(t, "e5m2") for t in p[1])]
        assert len(fewer) == 3, "the output projection's three products, and no other"
        assert all(in_set(t, "fp16") for p in fewer for t in p[1])
        for layer in converted:
            kinds = {product for product in ("forward", "error", "gradient") if calls[f"{layer} {product}"]}
            products_of_matmul = {"forward", "error"}
            assert kinds == (
                products_of_matmul
                if layer.endswith(("scores", "score", "context"))
                else {"forward", "error", "gradient"}
            ), layer
        for layer, tensor in results:
            assert in_set(tensor, "fp16" if layer == output_layer(name) else "e5m2"), layer
        for layer in converted:
            weight = getattr(model.get_submodule(layer), "weight", None)
            # A weight that is used once a step holds that one rounded gradient; a recurrent one a sum of them, unless
            # one product sums over all time steps.
            if weight is not None and recipe.recurrent_gradients == "sequence":
                assert calls[f"{layer} gradient"] == 1
            if weight is not None and calls[f"{layer} gradient"] == 1:
                tied = layer == output_layer(name) and name == "transformer"
                assert tied or in_set(weight.grad, "fp16" if layer == output_layer(name) else "e5m2"), layer
        assert masters.step(SCALE)
        for parameter_name, parameter in model.named_parameters():
            assert in_set(parameter, "fp16"), parameter_name


@pytest.mark.parametrize(("name", "recipe"), [(name, "fp8") for name in MODELS] + [("gnmt", "fp8_sequence")])
def test_every_operand_result_gradient_and_master_lies_in_its_set(name: str, recipe: str) -> None:
    check_training(name, load_recipe(recipe))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("role", ROLES)
def test_the_proof_notices_a_role_that_is_switched_off(name: str, role: str) -> None:
    with pytest.raises(AssertionError):
        check_training(name, replace(load_recipe("fp8"), **{role: IDENTITY}))


@pytest.mark.parametrize("name", MODELS)
def test_the_proof_notices_a_product_that_is_left_out(name: str) -> None:
    with pytest.raises(AssertionError):
        check_training(name, replace(load_recipe("fp8"), attention_products=False))


@pytest.mark.parametrize("name", MODELS)
def test_the_recurrent_and_attention_products_are_among_them(name: str) -> None:
    model, _ = build(name, load_recipe("fp8"))
    seen: Counter[tuple[str, str]] = Counter()
    with model.fp8_context.observe(lambda layer, product, operands: seen.update([(layer, product)])):
        backward(model, 0)
    if name == "gnmt":
        # One product for the inputs of all steps, one recurrent product a step.
        assert seen["decoder.layers.2.input_gates", "forward"] == 1
        assert seen["decoder.layers.2.hidden_gates", "forward"] == 4
        assert seen["encoder.bidirectional.backward_layer.hidden_gates", "forward"] == 5
        assert seen["decoder.layers.2.hidden_gates", "gradient"] == 4
        # The first state is zero and asks for no gradient.
        assert seen["decoder.layers.2.hidden_gates", "error"] == 3
        assert seen["decoder.attention.score", "error"] == 2
    else:
        for layer in ("encoder.layers.0.self_attn", "decoder.layers.1.encoder_attn"):
            assert seen[f"{layer}.product.scores", "forward"] == 1
            assert seen[f"{layer}.product.context", "error"] == 2


@pytest.mark.parametrize("name", MODELS)
def test_no_two_roundings_share_random_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time steps, micro-batches, reused layers and steps: every stochastic rounding has a stream of its own."""
    drawn: Counter[int] = Counter()
    stream = StepContext.stream

    def spy(self: StepContext, module: str, call: int, operand: str, role: str) -> int:
        value = stream(self, module, call, operand, role)
        drawn[value] += 1
        return value

    stochastic = replace(load_recipe("fp8_stochastic"), weight=Rounding(rounding="stochastic"))
    model, masters = build(name, stochastic)
    monkeypatch.setattr(StepContext, "stream", spy)
    for step in range(2):
        # Outside of a block every micro-step rounds the weights again, to the same bits.
        with masters.context.fixed_weights():
            for micro_step in range(2):
                backward(model, step, micro_step)
        masters.step(SCALE)
    repeated = [value for value, count in drawn.items() if count > 1]
    assert not repeated
    assert len(drawn) > 4 * 40


def test_equal_time_steps_are_rounded_differently() -> None:
    """An LSTM fed the same input at every step: its recurrent errors would be equal if the steps shared bits."""
    torch.manual_seed(0)
    layer = nn.Sequential(LSTMLayer(8, 64))
    recipe = replace(load_recipe("fp8_stochastic"), exempt=())
    inject(layer, recipe, StepContext(seed=1), backend="emulate")
    rounded: list[Tensor] = []

    def keep(layer_name: str, product: str, operands: tuple[products.Operand, ...]) -> None:
        if product == "gradient" and layer_name.endswith("hidden_gates"):
            rounded.append(operands[0].codes.float())

    gates = layer[0].hidden_gates
    hidden = torch.randn(4, 64)
    error = torch.randn(4, 256)
    layer.fp8_context.begin(0)
    with layer.fp8_context.observe(keep):
        for _ in range(6):
            gates(hidden).backward(error)
    assert len(rounded) == 6
    for first in range(6):
        for second in range(first):
            # Each value lies between its two neighbours: about half of them agree by chance.
            differing = (rounded[first] != rounded[second]).float().mean().item()
            assert 0.2 < differing < 0.6


def recurrent_step(recipe: Recipe, sequences: int = 1) -> tuple[LSTMLayer, list[tuple[str, tuple[Tensor, ...]]]]:
    """One backward pass through an LSTM over `sequences` sequences; its recurrent operands, decoded."""
    torch.manual_seed(0)
    model = nn.Sequential(LSTMLayer(8, 24, init_range=0.4))
    inject(model, replace(recipe, exempt=()), StepContext(seed=1), backend="emulate")
    MasterWeights(model, torch.optim.SGD(model.parameters(), 0.1), recipe)
    model.fp8_context.begin(0)  # type: ignore[union-attr,operator]
    seen: list[tuple[str, tuple[Tensor, ...]]] = []

    def keep(layer: str, product: str, operands: tuple[products.Operand, ...]) -> None:
        if layer.endswith("hidden_gates") and product == "gradient":
            seen.append((layer, tuple(o.decoded().clone() for o in operands)))

    outputs = [model(torch.randn(7, 3, 8))[0] for _ in range(sequences)]
    with model.fp8_context.observe(keep):
        sum((out.sin().sum() for out in outputs), torch.zeros(())).mul(64.0).backward()
    return model[0], seen


def test_a_recurrent_weights_gradient_is_one_product_over_the_sequence_rounded_once() -> None:
    nearest = replace(load_recipe("fp8_sequence"), gradient=Rounding("e5m2", "nearest"))
    layer, seen = recurrent_step(nearest)
    ((_, (error, x)),) = seen
    assert error.shape == (7 * 3, 4 * 24)
    assert x.shape == (7 * 3, 24)
    exact = error.double().t() @ x.double()
    rounded = torch.from_numpy(exact.float().numpy().astype(DTYPES["e5m2"]).astype("float32"))
    grad = layer.hidden_gates.weight.grad
    # A sum in FP32 may fall on the other side of a tie.
    assert (grad != rounded).float().mean() < 1e-3
    torch.testing.assert_close(layer.hidden_gates.bias.grad.double(), error.double().sum(0), rtol=1e-5, atol=1e-5)


def test_each_sequence_has_a_recurrent_gradient_of_its_own() -> None:
    layer, seen = recurrent_step(load_recipe("fp8_sequence"), sequences=2)
    assert [operands[0].shape[0] for _, operands in seen] == [21, 21]
    exact = sum(error.double().t() @ x.double() for _, (error, x) in seen)
    # Two roundings to a quarter of the value at most.
    assert (layer.hidden_gates.weight.grad.double() - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("backend", ["emulate", "auto"])
@pytest.mark.parametrize("change", [{}, {"gradient": IDENTITY}, {"gradient": Rounding("e5m2", scaling="tensor")}])
def test_gradients_added_as_they_are_rounded_are_those_that_autograd_adds(
    backend: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(load_recipe("fp8"), exempt=(), **change)

    def gradients(telemetry: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(LSTMLayer(8, 24, init_range=0.4))
        inject(model, recipe, StepContext(seed=1), backend=backend)
        MasterWeights(model, torch.optim.SGD(model.parameters(), 0.1), recipe)
        model.fp8_context.telemetry.active = telemetry  # type: ignore[union-attr]
        x = torch.randn(7, 3, 8)
        for micro_step in range(2):
            model.fp8_context.begin(0, micro_step)  # type: ignore[union-attr,operator]
            model(x)[0].sin().sum().mul(64.0).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    summed = [gradients(), gradients(telemetry=True)]
    monkeypatch.setattr("fp8repro.precision.functional._gathering", lambda *_: None)
    by_autograd = gradients()
    for found in summed:
        assert all(torch.equal(a, b) for a, b in zip(found, by_autograd, strict=True))


def test_scaled_operands_keep_a_gradient_for_every_time_step() -> None:
    scaled = replace(load_recipe("fp8_sequence"), error=Rounding("e5m2", scaling="tensor"))
    layer, seen = recurrent_step(scaled)
    assert len(seen) == 7
    exact = sum(error.double().t() @ x.double() for _, (error, x) in seen)
    assert (layer.hidden_gates.weight.grad.double() - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("goes_back", [True, False])
def test_a_sequences_gradient_dies_with_its_graph(goes_back: bool) -> None:
    model = nn.Sequential(LSTMLayer(8, 24))
    inject(model, replace(load_recipe("fp8_sequence"), exempt=()), StepContext(seed=1), backend="emulate")
    shared = model[0].hidden_gates.repeated()
    loss = shared(torch.randn(3, 24)).sum()
    gathered = weakref.ref(shared.keywords["shared"].gathered)
    if goes_back:
        loss.backward()
    del shared, loss
    assert gathered() is None


def test_hooks_see_every_time_step_of_a_recurrent_product() -> None:
    model = nn.Sequential(LSTMLayer(8, 24))
    inject(model, replace(load_recipe("fp8_sequence"), exempt=()), StepContext(seed=1), backend="emulate")
    shapes: list[torch.Size] = []
    model[0].hidden_gates.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    model(torch.randn(5, 3, 8))
    assert shapes == [torch.Size((3, 96))] * 5


def test_evaluation_rounds_to_nearest_and_repeats_itself() -> None:
    model, _ = build("gnmt", load_recipe("fp8_stochastic"))
    model.eval()
    with torch.no_grad():
        first = model(SOURCE, DECODER_INPUT)
        model.fp8_context.begin(7)  # type: ignore[union-attr,operator]
        assert torch.equal(model(SOURCE, DECODER_INPUT), first)


@pytest.mark.parametrize("name", MODELS)
def test_incremental_decoding_in_fp8_gives_the_logits_of_the_whole_sequence(name: str) -> None:
    model, _ = build(name, load_recipe("fp8"))
    model.eval()
    target = torch.tensor([[2, 6, 5, 4], [2, 9, 7, 7], [2, 10, 11, 4]])
    with torch.no_grad():
        whole = model(SOURCE, target)
        state = model.begin(SOURCE)  # type: ignore[operator]
        for step in range(4):
            logits, _ = model.step(target[:, step], state)  # type: ignore[operator]
            # Sums of other shapes may differ in the last bit and then round to the neighbouring value.
            assert (logits - whole[:, step]).norm() < 0.1 * whole[:, step].norm()


@pytest.mark.parametrize("backend", ["emulate", "auto"])
def test_a_decoder_keeps_the_codes_of_what_it_has_rounded(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same translations and scores as when every step rounds all of the cache, from far fewer roundings."""
    torch.manual_seed(0)
    model = transformer(VOCABULARY, width=16, ffn_width=32, heads=2, encoder_layers=1, decoder_layers=2)
    inject(model, load_recipe("fp8"), StepContext(seed=3), backend=backend)
    model.eval()
    config = DecodeConfig(beam=3, alpha=1.0, max_length_a=0.0, max_length_b=12)
    rounded: list[int] = []
    operand = Site.operand

    def count(self: Site, x: Tensor, *rest: Any) -> products.Operand:
        rounded.append(x.numel() if x.dtype == torch.float32 else 0)
        return operand(self, x, *rest)

    monkeypatch.setattr(Site, "operand", count)
    kept = beam_search(model, SOURCE, config)
    few = sum(rounded)
    with torch.no_grad():
        assert model.begin(SOURCE).layers[0].cross_key.dtype == torch.float8_e5m2
    rounded.clear()
    monkeypatch.setattr(Site, "codes", lambda self, x, training: x)
    assert beam_search(model, SOURCE, config) == kept
    assert sum(rounded) > 1.3 * few


def test_training_and_measured_steps_keep_the_values_themselves() -> None:
    model, _ = build("transformer", load_recipe("fp8"))
    assert model.begin(SOURCE).layers[0].cross_key.dtype == torch.float32  # type: ignore[operator]
    model.fp8_context.telemetry.active = True  # type: ignore[union-attr]
    with torch.no_grad():
        assert model.begin(SOURCE).layers[0].cross_key.dtype == torch.float32  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size"),
    [("transformer", {}), ("gnmt", {"layers": 4}), ("gnmt", {"layers": 8})],
)
def test_the_full_size_models_train_on_a_cpu(name: str, size: dict[str, int]) -> None:
    torch.manual_seed(0)
    recipe = load_recipe("fp8")
    model: nn.Module = (gnmt if name == "gnmt" else transformer)(32320, **size)
    inject(model, recipe, backend="emulate")
    masters = MasterWeights(model, torch.optim.Adam(model.parameters(), lr=1e-4), recipe)
    losses = []
    for step in range(3):
        model.fp8_context.begin(step)  # type: ignore[union-attr,operator]
        model.zero_grad()
        loss, _ = smoothed_loss(model(SOURCE, DECODER_INPUT), TARGET, 0.1)
        (loss * (SCALE / 10)).backward()
        assert masters.step(SCALE)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
