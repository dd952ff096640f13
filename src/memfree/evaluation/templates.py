"""The package's HTML templates."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def template(name: str, part: str = "evaluation") -> Template:
    """A template by its file name; it escapes what it shows.

    Args:
        name: of the file.
        part: folder of memfree that has it; what it includes may be of evaluation.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("memfree", one) for one in (part, "evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
