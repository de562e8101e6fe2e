"""The README's code runs, and is what it says it is."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agsm_loss import AGSMRegularizer
from agsm_loss.integrations.tokens.attach import AttachedTokens
from agsm_loss.integrations.tokens.saved import SavedTokens

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUICKSTART = ROOT / "recipes" / "quickstart.py"


def test_the_quickstart_is_in_the_readme():
    assert f"```python\n{QUICKSTART.read_text()}```" in README


def test_the_quickstart_shows_a_falling_loss():
    done = subprocess.run(
        [sys.executable, "-W", "error", QUICKSTART], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"loss ([\d.]+)  matching caption ranked first ([\d.]+)", done.stdout)
    losses, won = zip(*((float(a), float(b)) for a, b in rows), strict=True)
    assert losses[-1] < 0.5 * losses[0] and won[-1] > won[0]


def test_the_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


OURS = {"agsm": AGSMRegularizer, "attached": AttachedTokens, "saved": SavedTokens}


def added(hunk):
    """A hunk's added lines as a module of their own; with its context where it takes lines away."""
    kept = "+ " if re.search("^-", hunk, re.MULTILINE) else "+"
    lines = [line[1:] for line in hunk.splitlines() if line[:1] in kept]
    text = textwrap.dedent("\n".join(lines))
    return ast.parse(text + " pass" if text.endswith(":") else text)


@pytest.mark.parametrize("number", range(4))
def test_the_patches_name_what_there_is(number):
    block = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)[number]
    trees = [added(hunk) for hunk in block.split("@@\n")[1:]]
    names, checked = {}, 0
    for node in (one for tree in trees for one in tree.body if isinstance(one, ast.ImportFrom)):
        module = importlib.import_module(node.module)
        names |= {one.name: getattr(module, one.name) for one in node.names}
    for call in (one for tree in trees for one in ast.walk(tree) if isinstance(one, ast.Call)):
        function, keywords = call.func, {one.arg: None for one in call.keywords}
        places = [None] * len(call.args)
        if isinstance(function, ast.Name) and function.id in names:
            inspect.signature(names[function.id]).bind(*places, **keywords)
        elif isinstance(function, ast.Name) and function.id in OURS:
            kind = OURS[function.id]
            inspect.signature(kind.__call__).bind(None, *places, **keywords)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = OURS.get(function.value.id, names.get(function.value.id))
            if owner is None:
                continue  # torch's, or the script's own
            own = () if inspect.isclass(names.get(function.value.id)) else (None,)
            inspect.signature(getattr(owner, function.attr)).bind(*own, *places, **keywords)
        else:
            continue
        checked += 1
    assert checked >= (1 if number == 2 else 5)  # the third is the second's call again
