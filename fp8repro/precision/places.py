"""Where in a recipe a product of a model stands: what `inject` was told, kept for products that are found later."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from fp8repro.engines.products import Backend
from fp8repro.numerics.recipe import AUTO, ROLES, Recipe
from fp8repro.precision.context import StepContext
from fp8repro.precision.site import Site

OPERAND_ROLES = ROLES[:4]
# The attribute of a module that holds the places of the products which it computes through functions.
FUNCTION_PRODUCTS = "fp8_products"


@dataclass
class Places:
    """Gives products their places (`Site`).

    Attributes:
        prefix: see `inject`.
        leave: patterns of modules, and of products, that stay what they are.
    """

    recipe: Recipe
    context: StepContext
    backend: Backend
    prefix: str = ""
    leave: tuple[str, ...] = field(default=())

    def site(self, name: str, exempt: bool) -> Site:
        """The place of a layer or product of that name (without the prefix)."""
        recipe = self.recipe
        roles = {role: recipe.exempt_roles if exempt else getattr(recipe, role) for role in OPERAND_ROLES}
        self.context.telemetry.roundings[self.prefix + name] = roles
        options = (recipe.round_outputs, recipe.round_input_errors, recipe.recurrent_gradients)
        return Site(self.prefix + name, roles, self.context, self.backend, *options)

    def exempts(self, name: str) -> bool:
        """Whether a pattern of the recipe exempts the name; "auto" means layers only."""
        return self.recipe.exempt != AUTO and any(fnmatchcase(name, pattern) for pattern in self.recipe.exempt)

    def is_exempt(self, site: Site) -> bool:
        """Whether a place is an exempt one."""
        return all(rounding is self.recipe.exempt_roles for rounding in site.roles.values())

    def leaves(self, name: str) -> bool:
        """Whether a pattern of `leave` matches the name."""
        return any(fnmatchcase(name, pattern) for pattern in self.leave)
