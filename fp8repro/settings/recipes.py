"""The recipes that come along, by name."""

from __future__ import annotations

from fp8repro.errors import UserError
from fp8repro.numerics.recipe import Recipe, recipe_from_mapping
from fp8repro.settings.choices import compose_group


def load_recipe(name: str) -> Recipe:
    """The recipe `conf/precision/<name>.yaml`.

    Raises:
        UserError: there is no such recipe.
    """
    values = compose_group("precision", name)
    values.pop("default_loss_scaling", None)
    return recipe_from_mapping(values)


def as_recipe(recipe: object) -> Recipe:
    """A recipe, or the one of that name.

    Raises:
        UserError: there is no such recipe, or it is neither.
    """
    if isinstance(recipe, str):
        return load_recipe(recipe)
    if not isinstance(recipe, Recipe):
        raise UserError(f"recipe: got {recipe!r}, expected a Recipe or the name of one")
    return recipe
