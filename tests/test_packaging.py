"""The core imports nothing heavy, and the wheel holds what the tree holds."""

import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tomllib

import agsm_loss

ROOT = Path(__file__).parent.parent
HEAVY = "accelerate|datasets|diffusers|peft|transformers|trl"
LIGHT = f"""
import importlib, sys

def loaded():
    return ", ".join(sorted(set({HEAVY.split("|")!r}) & set(sys.modules))) or "none"

for name in sys.argv[1:]:
    importlib.import_module(name)
print(loaded())
sys.modules["safetensors"] = None
try:
    import agsm_loss.integrations.tokens.saved
except ImportError as error:
    print(error)
del sys.modules["safetensors"]
import agsm_loss.integrations.denoisers
print(loaded())
import accelerate
print(loaded())
"""


def test_the_core_and_the_denoisers_import_no_other_library():
    """In one new process; last, that the check can fail."""
    modules = [f"agsm_loss.{p.stem}" for p in (ROOT / "agsm_loss").glob("*.py")]
    modules.remove("agsm_loss.__init__")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *modules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    core, *missing, denoisers, check = done.stdout.splitlines()
    assert core == denoisers == "none" and check == "accelerate"
    assert 'In a clone of agsm-loss, run: pip install ".[diffusers]"' in "".join(missing)


def test_the_remedies_name_extras_that_there_are():
    """A clone is what works: the package is on no index."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = set()
    for folder in ("agsm_loss", "integrations", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert not re.search(r"pip install \S*agsm-loss", text), file
            named |= set(re.findall(r'how_to_install\("(\w+)"\)', text))
    assert named == {"diffusers", "trl"} and named | {"recipes"} <= set(extras)


def test_a_missing_package_of_the_recipes_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"missing: peft\. In the clone, run: pip install"):
        runpy.run_path(str(ROOT / "recipes" / "run" / "__init__.py"))


def test_every_package_folder_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {"agsm_loss", "agsm_loss.integrations"}
    for name, folder in (("agsm_loss", "agsm_loss"), ("agsm_loss.integrations", "integrations")):
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    assert listed == found


IN_CLONE = """
import sys
sys.meta_path[:] = [one for one in sys.meta_path if "Editable" not in getattr(one, "__name__", "")]
import agsm_loss
import agsm_loss.integrations.hosts.base as base
from agsm_loss.integrations import how_to_install, noise
from agsm_loss import integrations
assert integrations.noise is noise and base.AGSMRegularizer is agsm_loss.AGSMRegularizer
for one in (agsm_loss, integrations, noise, base):
    print(one.__name__, one.__file__)
try:
    import agsm_loss.recipes
except ModuleNotFoundError:
    print("no recipes")
"""


def test_a_clones_root_has_the_integrations(tmp_path):
    """Python that starts there imports the clone's folders, whatever is installed."""
    for folder in ("agsm_loss", "integrations"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", IN_CLONE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "agsm_loss": "agsm_loss/__init__.py",
        "agsm_loss.integrations": "integrations/__init__.py",
        "agsm_loss.integrations.noise": "integrations/noise.py",
        "agsm_loss.integrations.hosts.base": "integrations/hosts/base.py",
    }
    found = [f"{name} {tmp_path / file}" for name, file in expected.items()]
    assert done.stdout.splitlines() == [*found, "no recipes"]


def test_no_module_shadows_a_library():
    names = {p.stem for folder in ("integrations", "recipes") for p in (ROOT / folder).glob("*.py")}
    assert not names & set(HEAVY.split("|"))


def test_one_version():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert agsm_loss.__version__ == settings["project"]["version"] == version("agsm-loss")


def test_core_dependencies():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {d.split(">")[0] for d in settings["project"]["dependencies"]}
    assert names == {"einops", "jaxtyping", "torch"}


@pytest.mark.parametrize("name", agsm_loss.__all__)
def test_public_names_are_documented(name):
    item = getattr(agsm_loss, name)
    assert item.__doc__ and len(item.__doc__) > 20
