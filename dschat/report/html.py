"""Pages of one file: a template filled with texts that can neither run nor steer a terminal."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dschat.utils.files import write_anew
from dschat.utils.printable import printable

BASE = Path(__file__).parent  # holds base.html.j2, which every page extends


def fill(template: Path, context: Mapping[str, Any], script: str = "") -> str:
    """Fill a template beside `base.html.j2`; all texts are escaped, markup stays as it is.

    Args:
        script: of the page itself. It alone may run: the page's policy names its hash.
    """
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader([template.parent, BASE])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    return environment.get_template(template.name).render(
        **_escaped(dict(context)), script=Markup(script), allowed=Markup(allowed)
    )


def put_in_place(path: Path, data: bytes) -> None:
    """Write a file, which takes its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    write_anew(part, data)
    os.replace(part, path)


def _escaped(value: Any) -> Any:
    """Make every text of a nested structure printable; pictures stay as they are."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return _escaped(vars(value))
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return printable(value)
    return value
