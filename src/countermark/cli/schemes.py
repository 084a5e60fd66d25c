"""The command `schemes`: list the schemes and their fields."""

from __future__ import annotations

from typing import Annotated

import typer

from countermark.cli.options import AsJson, show_result


def schemes(
    name: Annotated[str | None, typer.Argument(help="One scheme, with its fields.")] = None,
    as_json: AsJson = False,
) -> int:
    """List the schemes, or show one with all its fields and defaults.

    \b
    Example:
        countermark schemes
        countermark schemes uchida --json
    """
    from countermark.schemes import SCHEMES, find_scheme_class

    if name is None:
        rows = {each: str(scheme.paper) for each, scheme in SCHEMES.items()}
        show_result(rows, as_json, "\n".join(f"{each}\n    {rows[each]}" for each in rows))
        return 0
    about = find_scheme_class(name).describe_scheme()
    lines = [f"{field}: {value}" for field, value in about.items() if field != "fields"]
    lines += ["fields:", *(f"  {each} = {default}" for each, default in about["fields"].items())]
    show_result(about, as_json, "\n".join(lines))
    return 0
