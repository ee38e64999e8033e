"""Generated content of pages. A page asks for it in a comment on a line of its own:

<!-- figure: nat What the keys of a query are. -->    a figure of figures.py, with its caption
<!-- models: nat_* dinat_* -->                        the models that match
<!-- recipes: nat_* -->                               the recipes that match
<!-- costs -->                                        the ops and their cost
"""

import posixpath
import re

import page_tables as tables
from figures import FIGURES

REQUEST = re.compile(r"^<!-- (figure|models|recipes|costs)(?:: (.*?))? -->$", re.MULTILINE)


def fill(markdown: str, page: str) -> str:
    """Replace the comments of a page that ask for generated content.

    Args:
        markdown: text of the page.
        page: path of the page below docs/.

    Raises:
        ValueError: no figure has the name, or a pattern matches no model or recipe.
    """
    return REQUEST.sub(lambda found: _content(found[1], found[2] or "", page), markdown)


def _content(kind: str, argument: str, page: str) -> str:
    if kind == "costs":
        return tables.costs()
    if kind == "models":
        return tables.models(argument)
    if kind == "recipes":
        return tables.recipes(argument)
    name, _, caption = argument.partition(" ")
    if name not in FIGURES:
        raise ValueError(f"{page}: wanted a figure of {', '.join(FIGURES)}, got {name!r}")
    path = posixpath.relpath(f"figures/{name}.svg", posixpath.dirname(page) or ".")
    return f"![{caption}]({path})\n\n*{caption}*"
