"""Templates to pages."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import jinja2

HEAT_STEPS = 9
"""Colours of heat maps, ``--h0`` to ``--h8`` of the styles."""


def _source(name: str) -> str:
    return resources.files("ptq.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def render_page(template: str, **values: Any) -> str:
    """A template of this package; a value that it uses and does not get is an error."""
    return _environment().get_template(template).render(heat_steps=range(HEAT_STEPS), **values)
