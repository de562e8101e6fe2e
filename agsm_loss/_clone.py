"""`agsm_loss.integrations` in a clone, where its folder is beside this package, not in it.

A wheel puts the folder in the package, and an editable install maps it. Without either, Python that
starts in the clone's root finds the clone's `agsm_loss` first, and must be shown the folder.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

NAME = "agsm_loss.integrations"
PACKAGE = Path(__file__).parent
BESIDE = PACKAGE.parent / "integrations" / "__init__.py"


class CloneFinder:
    """Finds `agsm_loss.integrations` beside the package, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        return spec_from_file_location(
            name, BESIDE, submodule_search_locations=[str(BESIDE.parent)]
        )


def find_integrations() -> None:
    """Lets Python look beside the package, last of all; nothing where there is no need."""
    if BESIDE.exists() and not (PACKAGE / "integrations").exists():
        sys.meta_path.append(CloneFinder)
