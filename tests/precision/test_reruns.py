"""Parts of a forward pass that run again in the backward pass: the bits of one that keeps everything, or an error."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8repro.errors import UserError
from fp8repro.numerics.recipe import Recipe
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe

FP8 = replace(load_recipe("fp8"), exempt=())
STOCHASTIC = replace(load_recipe("fp8_stochastic"), exempt=())
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
Part = Callable[[Tensor], Tensor]


class Rerunning(torch.autograd.Function):
    """Keeps nothing but its input, as the checkpoints of other packages do."""

    @staticmethod
    @functools.wraps(lambda: None)
    def forward(*arguments: Any) -> Tensor:
        ctx, part, x = arguments
        ctx.part = part
        ctx.save_for_backward(x)
        result: Tensor = part(x)
        return result

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.part(x)
        torch.autograd.backward(result, error)
        return None, x.grad


def kept(part: Part, x: Tensor) -> Tensor:
    return part(x)


RERUNS: dict[str, Callable[[Part, Tensor], Tensor]] = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "function": Rerunning.apply,
}
RERUNS |= {
    "reentrant twice": lambda part, x: RERUNS["reentrant"](lambda y: RERUNS["reentrant"](part, y), x),
    "both": lambda part, x: RERUNS["reentrant"](lambda y: RERUNS["not reentrant"](part, y), x),
}


class Methods(nn.Module):
    """Products by functions before, in and behind two parts that may run again."""

    def __init__(self, how: Callable[[Part, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.how = nn.Linear(8, 24), nn.Parameter(torch.randn(8, 8)), how

    def attend(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mask = (x @ x.transpose(-1, -2)) > -9
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(torch.einsum("bik,bjk->bij", q, k).masked_fill(~mask, 0), -1)
        return F.scaled_dot_product_attention(weights @ v, k, v)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.out) + x @ self.out

    def forward(self, x: Tensor) -> Tensor:
        x = x + x @ x.transpose(-1, -2) @ x / 8
        x = x + self.how(self.project, self.how(self.attend, x))
        return x @ x.transpose(-1, -2)


def gradients(how: Callable[[Part, Tensor], Tensor], recipe: Recipe, passes: int) -> list[Tensor]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), Methods(how), nn.LayerNorm(5))
    inject(model, recipe, StepContext(seed=3))
    for step in range(passes):
        model.fp8_context.begin(step)
        model.zero_grad()
        x = X.clone().requires_grad_()
        loss = (model(x) * torch.linspace(-1, 1, 25).view(5, 5)).sum() * 64
        # A device has a thread of its own for its backward pass.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(loss.backward).result()
    return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("how", RERUNS)
@pytest.mark.parametrize("recipe", [FP8, STOCHASTIC], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("passes", [1, 2])
def test_methods_that_run_again_give_the_bits_of_a_step_that_keeps_everything(
    how: str, recipe: Recipe, passes: int
) -> None:
    right = gradients(kept, recipe, passes)
    assert all(bool(grad.isfinite().all() and grad.any()) for grad in right)
    found = gradients(RERUNS[how], recipe, passes)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


class Recursive(nn.Module):
    """Runs itself in a part that may run again, between products of that part, which are called twice a pass."""

    def __init__(self, how: Callable[[Part, Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.depth = how, 0

    def again(self, x: Tensor) -> Tensor:
        x = x @ x.t() / 8
        self.depth += 1
        x = self(x) if self.depth == 1 else x
        self.depth -= 1
        return x @ x.t() / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.again, x) if self.depth == 0 else torch.relu(x @ x)


def test_a_module_may_run_itself_in_a_part_of_itself() -> None:
    results = []
    for how in (kept, RERUNS["reentrant"], RERUNS["not reentrant"]):
        model: Any = nn.ModuleList([nn.Linear(8, 8), Recursive(how)])
        inject(model, replace(load_recipe("fp8_nearest"), exempt=()))
        x = X[0].clone().requires_grad_()
        for step in range(2):
            model.fp8_context.begin(step)
            x.grad = None
            (model[1](x).sum() * 64).backward()
        results.append(x.grad)
    assert results[0].any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("how", ["kept", *RERUNS])
def test_a_pass_is_freed_with_its_graph(how: str, gradients: bool) -> None:
    model: Any = nn.Sequential(Methods(RERUNS.get(how, kept)))
    inject(model, FP8)
    seen: list[Any] = []
    model[0].qkv.register_forward_hook(lambda layer, inputs, result: seen.append(weakref.ref(result)))
    for step in range(2):
        model.fp8_context.begin(step)
        with torch.set_grad_enabled(gradients):
            y = model(X.clone().requires_grad_())
        if gradients:
            y.sum().backward()
        del y
    # Once in the forward pass, and once at each place that runs it again.
    runs = {"kept": 1, "reentrant twice": 3, "both": 3}.get(how, 2)
    assert len(seen) == 2 * (runs if gradients else 1)
    assert all(result() is None for result in seen)


class ByHand(torch.autograd.Function):
    """A product with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return error @ b.t(), a.t() @ error


class Apart(ByHand):
    """The same, its context apart."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class Applying(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.function = nn.Parameter(torch.randn(8, 8)), function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x, self.weight)
        return result


@pytest.mark.filterwarnings("ignore:inject. ")
def test_products_with_a_backward_pass_of_their_own_are_left_whole_or_refused() -> None:
    x, right = X[0].clone().requires_grad_(), Applying(ByHand)
    right(x).square().sum().backward()
    model = nn.Sequential(Applying(ByHand))
    inject(model, FP8)
    y = model(X[0].clone().requires_grad_())
    with pytest.raises(UserError, match=r"function in 0 that multiplies by matmul in .* leave=\['0.fp8_products.\*'\]"):
        y.sum().backward()
    for function, leave in ((ByHand, ["0.fp8_products.*"]), (Apart, [])):
        model = nn.Sequential(Applying(function))
        report = inject(model, FP8, leave=leave)
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            assert torch.equal(model[0].weight.grad, right.weight.grad)  # type: ignore[arg-type]
        assert report.without_owner() == ["0: matmul"]


@pytest.mark.filterwarnings("ignore:inject. ")
@pytest.mark.parametrize(
    "model", [nn.Linear(8, 8), nn.LSTM(8, 8), Methods(kept)], ids=("layer", "recurrent", "methods")
)
def test_transforms_of_functions_are_refused(model: nn.Module) -> None:
    whole = nn.Sequential(model)
    inject(whole, FP8)
    whole(X)

    def loss(x: Tensor) -> Tensor:
        result = whole(x)
        return (result[0] if isinstance(result, tuple) else result).sum()

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(
            UserError, match=r"layer 0.*: got called in a transform of torch.func .*, expected torch.auto"
        ):
            transform(loss)(X)
