"""Recipes of tiny models, for `foveate train`."""

from recipes import few_threads, images, make_recipe  # noqa: F401 - fixtures
