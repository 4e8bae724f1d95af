"""What `inject` did, and what the first forward pass showed of it: shares of parameters and of multiply-adds in FP8."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class InjectionRow:
    """One layer: qualified name, type, "converted", "exempt" or "left", and its formats or the reason."""

    name: str
    kind: str
    status: str
    detail: str
    parameters: int


@dataclass
class InjectionReport:
    """What `inject` did; the model's first forward pass adds what was multiplied.

    Attributes:
        backend: what multiplies; "torch" where nothing is converted.
        why: what kept "auto" from FP8 tensor cores, or "".
        parameters: of the whole model.
        multiply_adds: of the first pass, by (layer or module, what multiplied: "layer" or a function, whether under the
            recipe). Empty before it.
    """

    recipe: str
    backend: str
    why: str = ""
    rows: list[InjectionRow] = field(default_factory=list)
    parameters: int = 0
    multiply_adds: Counter[tuple[str, str, bool]] = field(default_factory=Counter)

    def names(self, status: str) -> list[str]:
        """Names of the layers of that status."""
        return [row.name for row in self.rows if row.status == status]

    def measured(self, counted: Mapping[tuple[str, str, bool], int], rows: Sequence[InjectionRow]) -> None:
        """Take in what a watched pass multiplied, and rows of products by functions that it found.

        Warns where nothing of it followed the recipe.
        """
        first = not self.multiply_adds
        known = {row.name for row in self.rows}
        self.rows += [row for row in rows if row.name not in known]
        self.multiply_adds.update(counted)
        if first and self.multiply_adds.total() and not self.share("converted") and not self.share("exempt"):
            warnings.warn("inject: no product of the first forward pass follows the recipe", stacklevel=2)

    def share(self, status: str) -> float:
        """Share of the first pass' multiply-adds in layers that are "converted", "exempt" or "left"; NaN before it.

        Products by functions that follow the recipe are "converted".
        """
        total = self.multiply_adds.total()
        if not total:
            return float("nan")
        return sum(n for key, n in self.multiply_adds.items() if self._status(key) == status) / total

    def parameter_share(self, status: str = "converted") -> float:
        """Share of the model's parameters whose layers are "converted" or "exempt".

        A parameter that functions multiply by under the recipe counts where its product does, from the first pass on.
        """
        here = sum(row.parameters for row in self.rows if row.status == status)
        return here / self.parameters if self.parameters else float("nan")

    def never_ran(self) -> list[str]:
        """Converted and exempt layers that the first pass did not use; all of them before it."""
        ran = [name for (name, what, _), n in self.multiply_adds.items() if what == "layer" and n]
        known = [row.name for row in self.rows if row.status in ("converted", "exempt")]
        return [name for name in known if not any(_within(other, name) for other in ran)]

    def without_owner(self) -> list[str]:
        """Products of the first pass that do not follow the recipe: `module: function`, the largest first."""
        left = [(n, name, what) for (name, what, converted), n in self.multiply_adds.items() if not converted and n]
        return [f"{name or 'the model'}: {what}" for _, name, what in sorted(left, reverse=True)]

    def _status(self, key: tuple[str, str, bool]) -> str:
        name, _, converted = key
        if not converted:
            return "left"
        exempt = self.names("exempt")
        return "exempt" if any(_within(name, layer) for layer in exempt) else "converted"

    def coverage(self) -> str:
        """What share follows the recipe, and what does not, in lines."""
        lines = [f"parameters: {self.parameter_share():.1%} converted, {self.parameter_share('exempt'):.1%} exempt"]
        if not self.multiply_adds:
            return "\n".join([*lines, "multiply-adds: not counted yet, the first forward pass counts them"])
        shares = ", ".join(f"{self.share(status):.1%} {status}" for status in ("converted", "exempt", "left"))
        lines.append(f"multiply-adds of the first pass: {shares}")
        for what, names in (("left to torch", self.without_owner()), ("never ran", self.never_ran())):
            if names:
                lines.append(
                    f"{what}: {', '.join(names[:8])}{f', and {len(names) - 8} more' if len(names) > 8 else ''}"
                )
        return "\n".join(lines)

    def table(self) -> str:
        """A plain-text table, one layer a line."""
        # Imported here: who never prints a report need not wait for it.
        from fp8repro.tabular import aligned

        rows = [(row.name, row.kind, row.status, row.detail) for row in self.rows]
        counts = ", ".join(f"{len(self.names(s))} {s}" for s in ("converted", "exempt", "left"))
        why = f" ({self.why})" if self.why else ""
        head = f"recipe {self.recipe}, products: {self.backend}{why}; {counts}"
        if self.backend != "torch":
            head = f"{head}\n{self.coverage()}"
        return f"{head}\n{aligned(('layer', 'type', 'status', 'formats or reason'), rows, 'plain')}"


def _within(name: str, layer: str) -> bool:
    """Whether a product is a layer's, or one of its parts'."""
    return not layer or name == layer or name.startswith(f"{layer}.")
