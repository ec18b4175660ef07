"""The `grad_sample_mode`s of an Opacus, read from its source. Imports neither Opacus nor torch.

Opacus has no list of them: its `get_gsm_class` compares a name with constants. Releases, branches
and forks all have that function, whatever modes it knows.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from dpsgd_track.config import require

PACKAGE = "opacus"
_FUNCTION = "get_gsm_class"
_FILE = Path("grad_sample") / "utils.py"

NEVER_ALONE = frozenset({"no_op"})
"""Modes that leave the per-sample gradients to the caller."""
SAME_AS_HOOKS = frozenset({"functorch", "ew"})
"""Other ways to the gradients of `hooks`, each for a few kinds of layers only. They run if asked
for by name."""


def grad_sample_modes(package: Path) -> tuple[str, ...]:
    """All `grad_sample_mode`s of the Opacus in the folder `package`, in alphabetical order.

    Raises:
        ValueError: the folder has no such function.
    """
    # Help does without.
    import ast

    file = package / _FILE
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected the source of Opacus's {_FUNCTION}. {error}") from None
    found = {
        constant.value
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == _FUNCTION
        for comparison in ast.walk(function)
        if isinstance(comparison, ast.Compare)
        for constant in ast.walk(comparison)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    require(bool(found), _FUNCTION, str(file), "a function that compares the names of modes")
    return tuple(sorted(found))


def version_of(package: Path) -> str:
    """The version that the Opacus in the folder `package` states; empty if it states none."""
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    stated = re.search(r"""__version__\s*=\s*["']([^"']+)""", text)
    return stated[1] if stated else ""


def installed_package() -> Path | None:
    """Folder of the Opacus that would be imported; None if there is none. Imports nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def installed_modes() -> tuple[str, ...]:
    """All `grad_sample_mode`s of the installed Opacus; none if it is not installed."""
    package = installed_package()
    return grad_sample_modes(package) if package else ()
