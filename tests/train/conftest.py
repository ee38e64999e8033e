"""A folder of 24 small images, and recipes of tiny models that train on it in a second."""

from recipes import everything, few_threads, images, make_recipe  # noqa: F401 - fixtures
