"""What people do with models, done to converted ones: parts, wrappers, copies, checkpointing, dtypes, autocast."""

from __future__ import annotations

import copy
import io
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ml_dtypes import float8_e5m2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.swin_transformer import SwinTransformer

from fp8repro.errors import UserError
from fp8repro.numerics.recipe import Recipe
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import context_of, inject, sites
from fp8repro.precision.loss_scaling import ConstantScale
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")
STOCHASTIC = load_recipe("fp8_stochastic")
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(model: Any, recipe: Recipe = FP8, steps: int = 3, forward: Any = None) -> list[Tensor]:
    """Parameters after some steps."""
    masters = MasterWeights(model, sgd(model), recipe)
    for step in range(steps):
        masters.context.begin(step)
        model.zero_grad()
        (F.cross_entropy((forward or model)(X), Y) * 64).backward()
        assert masters.step(64.0)
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Which context


def test_masters_of_a_wrapper_follow_the_context_of_the_part() -> None:
    alone, part = network(), network()
    inject(alone, FP8, StepContext(seed=5))
    inject(part, FP8, StepContext(seed=5))
    wrapper = nn.ModuleDict({"inner": part})
    masters = MasterWeights(wrapper, sgd(wrapper), FP8)
    assert masters.context is part.fp8_context is context_of(wrapper)
    for model, own in ((alone, MasterWeights(alone, sgd(alone), FP8)), (part, masters)):
        own.context.begin(0)
        F.cross_entropy(model(X), Y).backward()
    assert_same([p.grad for p in alone.parameters()], [p.grad for p in part.parameters()])


def test_a_whole_of_which_a_part_is_converted_is_refused_and_stays_as_it_was() -> None:
    whole = network()
    inject(whole[2], replace(FP8, exempt=()))
    types = [type(module) for module in whole.modules()]
    with pytest.raises(UserError, match="model: got one whose layer '2' is converted already"):
        inject(whole, FP8)
    assert [type(module) for module in whole.modules()] == types
    assert not hasattr(whole, "fp8_context")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": replace(FP8, exempt=("nothing*",))}, "precision.exempt: got 'nothing"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
        ({"leave": ("head",)}, "leave: got 'head', which matches none"),
        # Of its characters "*" would match everything.
        ({"leave": "2*"}, r"leave: got '2\*', expected a list of patterns"),
        ({"recipe": None}, "recipe: got None, expected a Recipe"),
        ({"context": 3}, "context: got 3, expected a StepContext"),
    ],
)
def test_a_refused_model_is_what_it_was(options: dict[str, Any], message: str) -> None:
    model, context = network(), StepContext()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError, match=message):
        inject(model, **{"recipe": FP8, "context": context, **options})
    assert {name: type(module) for name, module in model.named_modules()} == before
    inject(model, FP8, context)


def test_parts_share_a_context_under_names_of_their_own() -> None:
    context, parts = StepContext(), [network(), network()]
    inject(parts[0], FP8, context)
    with pytest.raises(UserError, match="context: got one that has a layer '0' already, expected another prefix="):
        inject(parts[1], FP8, context)
    inject(parts[1], FP8, context, prefix="second.")
    assert list(sites(parts[1])) == ["0", "2", "4"]
    assert [site.name for site in sites(parts[1]).values()] == ["second.0", "second.2", "second.4"]
    whole = nn.Sequential(*parts)
    assert MasterWeights(whole, sgd(whole), FP8).context is context


def test_parts_with_contexts_of_their_own_have_no_common_masters() -> None:
    parts = [network(), network()]
    for part in parts:
        inject(part, FP8)
    whole = nn.Sequential(*parts)
    with pytest.raises(UserError, match="model: got parts with 2 contexts"):
        MasterWeights(whole, sgd(whole), FP8)


# Recomputation


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", [FP8, STOCHASTIC])
def test_checkpointed_parts_draw_the_bits_of_their_forward_pass(reentrant: bool, recipe: Recipe) -> None:
    results = []
    for segments in (1, 2):
        model = network()
        inject(model, recipe, StepContext(seed=4))
        model.fp8_context.begin(3)  # type: ignore[operator]
        x = X.clone().requires_grad_()
        out = model(x) if segments == 1 else checkpoint_sequential(model, segments, x, use_reentrant=reentrant)
        F.cross_entropy(out, Y).backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters())])
    assert_same(*results)


def test_a_layer_that_is_called_twice_needs_to_be_told_which_call_is_repeated() -> None:
    def run(model: Any, context_fn: Any) -> list[Tensor]:
        model.fp8_context.begin(0)
        part = model if context_fn is None else lambda x: checkpoint(model, x, use_reentrant=False, **context_fn)
        (part(X[:, :4]).sum() + part(X[:, 4:]).square().sum()).backward()
        return [p.grad for p in model.parameters()]

    models = []
    for _ in range(3):
        models.append(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4)))
        models[-1].load_state_dict(models[0].state_dict())
        inject(models[-1], replace(STOCHASTIC, exempt=()), StepContext(seed=4))
    plain, told, untold = models
    assert_same(run(plain, None), run(told, {"context_fn": told.fp8_context.recomputation}))
    with pytest.raises(UserError, match=r"layer \d: got recomputed .* after 2 calls .*context\.recomputation"):
        run(untold, {})


# Dtypes and options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_that_are_not_fp32_are_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4)).to(dtype)
    with pytest.raises(UserError, match=rf"model: 0.weight is {dtype}, expected torch.float32"):
        inject(model, FP8)
    assert not hasattr(model, "fp8_context")
    assert inject(model, "bf16").names("converted") == []


def test_inputs_and_casts_that_cannot_be_honoured_are_named() -> None:
    model = network()
    inject(model, FP8)
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(UserError, match=rf"layer 0: got an input of {dtype}, expected float32"):
            model(X.to(dtype))
    for cast in (model.half, model.bfloat16, model.double):
        with pytest.raises(UserError, match=r"layer 0: got a (bias|weight) of torch\.\w+, expected float32"):
            cast()(X)
        model.float()


def test_inputs_of_16_bit_are_rounded_once_from_their_own_precision() -> None:
    layer = nn.Sequential(nn.Linear(8, 4, bias=False))
    inject(layer, replace(FP8, exempt=(), round_outputs=False), backend="emulate")
    weight = layer[0].weight.detach().numpy().astype(float8_e5m2).astype("float64")
    for dtype in (torch.float16, torch.bfloat16):
        x = X.to(dtype).requires_grad_()
        found = layer(x)
        rounded = x.detach().float().numpy().astype(float8_e5m2).astype("float64")
        torch.testing.assert_close(found.double(), torch.tensor(rounded @ weight.T), rtol=1e-5, atol=1e-6)
        found.sum().backward()
        assert x.grad.dtype == dtype  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["emulate", "auto"])
def test_autocast_changes_no_product(backend: str) -> None:
    results = []
    for enabled in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        inject(model, FP8, StepContext(seed=1), backend=backend)
        model.fp8_context.begin(0)  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
            assert out.dtype == torch.float32
            out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert_same(*results)


@pytest.mark.parametrize(
    "options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}, {"padding_idx": 3}]
)
def test_options_of_embeddings_are_honoured(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = nn.Embedding(9, 4, **options)
    theirs.weight.data = theirs.weight.data.half().float()
    model = nn.Sequential(copy.deepcopy(theirs), nn.Linear(4, 4))
    inject(model, FP8)
    MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), FP8)
    indices = torch.tensor([1, 3, 3, 5, 1, 1])
    error = torch.randn(6, 4)
    own = model[0]
    found, right = own(indices), theirs(indices)
    assert torch.equal(found, right)
    found.backward(error)
    right.backward(error)
    assert own.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(own.weight.grad.to_dense(), theirs.weight.grad.to_dense())  # type: ignore[union-attr, operator]
    assert torch.equal(own.weight.detach().float(), theirs.weight.detach())  # type: ignore[operator]


@pytest.mark.parametrize("format", ["fp16", "bf16", "e5m2", "e4m3"])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_scaled_roles_multiply_finite_numbers(format: str, magnitude: float) -> None:
    scaled = Rounding(format, scaling="tensor")
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    torch.manual_seed(0)
    nn.init.normal_(model[0].weight, std=magnitude)
    exact = model[0].weight.detach().half().double()
    roles = dict.fromkeys(("weight", "activation", "error", "gradient"), scaled)
    recipe = replace(FP8, exempt=(), **roles)  # type: ignore[arg-type]
    inject(model, recipe, backend="emulate")
    MasterWeights(model, sgd(model), recipe)
    x = torch.randn(16, 64)
    found = model(x).detach().double()
    right = x.double() @ exact.t()
    bits = {"fp16": 10, "bf16": 7, "e5m2": 2, "e4m3": 3}[format]
    # Three roundings of relative error 2^-(bits + 1) at most.
    assert (found - right).norm() < 3 * 2.0 ** -(bits + 1) * right.norm()


def test_encoders_evaluate_as_they_train_padded_ones_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    report = inject(encoder, replace(FP8, exempt=()))
    parts = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    assert report.names("converted") == [f"layers.{i}.{part}" for i in range(2) for part in parts]
    encoder.eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    for mask in (None, padding):
        with torch.no_grad():
            found = encoder(x, src_key_padding_mask=mask)
        right = encoder(x.clone().requires_grad_(), src_key_padding_mask=mask).detach()
        keep = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
        assert torch.equal(found[keep], right[keep])


# Weights that a function uses


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(self.embedding(tokens)) @ self.embedding.weight.t()


def test_an_embedding_that_is_multiplied_by_follows_the_recipe_in_16_bit_too() -> None:
    model, tokens = Tied(), torch.arange(9)
    report = inject(model, FP8)
    masters = MasterWeights(model, sgd(model), FP8)
    assert model.embedding.weight.dtype == torch.float16
    F.cross_entropy(model(tokens), tokens).backward()
    assert report.names("converted") == ["fp8_products.linear_0"]
    assert model.embedding.weight.grad.dtype == torch.float32
    assert masters.step()
    left = Tied()
    report = inject(left, FP8, leave=["embedding"])
    left(tokens)
    assert report.without_owner() == ["the model: matmul"]
    assert report.names("left") == ["embedding"]
    masters = MasterWeights(left, sgd(left), FP8)
    F.cross_entropy(left(tokens), tokens).backward()
    assert masters.step()


def test_a_part_of_a_weight_that_is_stored_in_16_bit_is_refused_and_may_be_left() -> None:
    class Halves(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(self.embedding(tokens)) @ self.embedding.weight[:4].t()

    tokens = torch.arange(9)
    for narrow, leave, message in ((True, (), "a part of a weight"), (False, (), ""), (True, ("embedding",), "")):
        model = Halves()
        inject(model, FP8, leave=leave)
        MasterWeights(model, sgd(model), FP8, narrow=narrow)
        if message:
            with pytest.raises(UserError, match=rf"{message} \(9, 8\) that is stored in 16 bit, expected inject"):
                model(tokens)
        else:
            assert model(tokens).shape == (9, 4)


def test_a_weight_that_one_of_our_own_layers_uses_behind_another_ones_back_is_named() -> None:
    model = network()
    inject(model, FP8)
    inner, outer = model[2], model[0]
    inner.register_forward_pre_hook(lambda module, inputs: torch.mm(X, outer.weight.t()).sum().backward())
    with pytest.raises(UserError, match=r"functions multiply by the weights of 0 without .* leave=\['0'\]"):
        model(X)


def test_torchvisions_swin_multiplies_by_its_projections_under_the_recipe_or_is_left() -> None:
    def swin() -> nn.Module:
        torch.manual_seed(0)
        return SwinTransformer([2, 2], 16, [1, 1], [2, 2], [2, 2], num_classes=4)

    x = torch.randn(2, 3, 16, 16)
    model = swin()
    report = inject(model, FP8)
    masters = MasterWeights(model, sgd(model), FP8)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert masters.step()
    assert report.never_ran() == []
    assert report.without_owner() == []
    assert "features.1.0.attn.fp8_products.matmul_1" in report.names("converted")
    model = swin()
    report = inject(model, FP8, leave=["*.attn.qkv", "*.attn.proj"])
    assert not [name for name in report.names("converted") if "attn" in name]
    masters = MasterWeights(model, sgd(model), FP8)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert masters.step()


def test_the_first_pass_is_the_only_one_that_is_watched() -> None:
    model = network()
    inject(model, FP8)
    assert model._forward_pre_hooks
    model(X)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# Whole models


def test_models_without_shapes_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"model: 0 \(LazyLinear\) has no shape yet"):
        inject(model, FP8)
    model(X)
    assert inject(model, FP8).names("exempt") == ["1"]


def roundtrip(model: nn.Module, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("when", ["fresh", "masters", "trained"])
def test_copies_of_a_model_train_as_the_model_does(how: str, when: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1, padding="same", padding_mode="circular"), nn.Flatten(), nn.Linear(8, 4)),
    )
    inject(model, replace(FP8, exempt=()), StepContext(seed=6))
    if when != "fresh":
        MasterWeights(model, sgd(model), FP8)
    if when == "trained":
        trained(model)
    other = roundtrip(model, how)
    assert other.fp8_context is not model.fp8_context
    assert_same(trained(model), trained(other))
    assert all(p.grad.dtype == torch.float32 for p in other.parameters())


@contextmanager
def one_process() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("order", ["masters", "replicas", "wrapped masters"])
def test_replicas_and_masters_in_any_order_train_as_one_model(order: str) -> None:
    alone = network()
    inject(alone, FP8, StepContext(seed=6))
    right = trained(alone)
    with one_process():
        model = network()
        inject(model, FP8, StepContext(seed=6))
        if order == "masters":
            MasterWeights(model, sgd(model), FP8)
        replica = DistributedDataParallel(model)
        found = trained(replica if order == "wrapped masters" else model, forward=replica)
        del replica
    assert_same([p.float() for p in right], found)


def test_replicas_of_masters_in_16_bit_are_refused() -> None:
    model = network()
    inject(model, FP8)
    MasterWeights(model, sgd(model), FP8)
    with one_process():
        replica = DistributedDataParallel(model)
        with pytest.raises(UserError, match=r"DistributedDataParallel: got master weights in 16 bit.* narrow=False"):
            replica(X)


def test_a_constant_scale_is_part_of_its_state() -> None:
    saved = ConstantScale(4096.0).state_dict()
    restored = ConstantScale(1.0)
    restored.load_state_dict(saved)
    assert restored.scale == 4096.0


def test_a_backward_pass_in_evaluation_mode_rounds_to_nearest() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    inject(model, replace(FP8, exempt=()), backend="emulate")
    model.eval()
    x, error = X.clone().requires_grad_(), torch.randn(32, 4)
    model(x).backward(error)
    weight = model[0].weight.detach().numpy().astype(float8_e5m2).astype("float32")
    exact = error.numpy().astype(float8_e5m2).astype("float32") @ weight
    assert torch.equal(x.grad, torch.tensor(exact.astype(float8_e5m2).astype("float32")))  # type: ignore[arg-type]
