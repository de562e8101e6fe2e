"""The patches for public training scripts: our lines alone, in our API's words."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import textwrap
from functools import cache
from typing import NamedTuple

import pytest
import readme

from agsm_loss import AGSMRegularizer
from agsm_loss.integrations.denoisers import TokenDenoiser

GUIDE = "integrations/patches/README.md"
FILES = {file.name: file for file in sorted((readme.ROOT / "integrations/patches").glob("*.diff"))}
OURS = {
    "agsm": AGSMRegularizer,
    "denoiser": TokenDenoiser,
}  # the scripts' names for objects of ours
every_patch = pytest.mark.parametrize("name", FILES)


class Hunk(NamedTuple):
    """Added lines, the upstream line that they follow, and the number of their first line."""

    after: int
    first: int
    lines: list[str]


class Patch(NamedTuple):
    """What is said before the diff, the diff's own first lines, and the hunks."""

    preamble: str
    head: list[str]
    hunks: list[Hunk]

    @property
    def path(self):
        return self.head[-1].removeprefix("+++ b/")


@cache
def patch(name):
    preamble, _, diff = FILES[name].read_text().partition("diff --git ")
    head, *rest = re.split(r"^(?=@@)", diff, flags=re.MULTILINE)
    hunks = []
    for hunk in rest:
        first, *lines = hunk.splitlines()
        numbers = re.fullmatch(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@", first)
        assert numbers, f"{first}: expected a hunk that removes nothing and names no upstream line"
        assert len(lines) == int(numbers[3] or 1)
        hunks.append(Hunk(int(numbers[1]), int(numbers[2]), lines))
    return Patch(preamble, head.splitlines(), hunks)


def test_the_guide_lists_the_patches():
    assert set(re.findall(r"\b\w+\.diff\b", readme.text_of(GUIDE))) == set(FILES)


@every_patch
def test_a_patch_holds_added_lines_alone(name):
    added, last = 0, 0
    for after, first, lines in patch(name).hunks:
        assert after > last and first == after + added + 1
        assert all(line.startswith("+") for line in lines)
        added, last = added + len(lines), after
    assert added > 10


@every_patch
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches")
def test_git_applies_a_patch(name, tmp_path):
    path = tmp_path / patch(name).path
    path.parent.mkdir(parents=True, exist_ok=True)
    upstream = [f"line {i}\n" for i in range(1, 2000)]
    path.write_text("".join(upstream))
    subprocess.run(["git", "apply", "--unidiff-zero", FILES[name]], check=True, cwd=tmp_path)
    applied = path.read_text().splitlines(keepends=True)
    for after, first, lines in patch(name).hunks:
        assert applied[first - 2] == upstream[after - 1]
        assert applied[first - 1 : first - 1 + len(lines)] == [line[1:] + "\n" for line in lines]
    assert [line for line in applied if line.startswith("line ")] == upstream


@every_patch
def test_a_patch_and_the_guide_name_the_commit_the_script_and_the_command(name):
    preamble, (paths, index, *_), _ = patch(name)
    path = patch(name).path
    assert paths == f"a/{path} b/{path}"
    assert re.fullmatch(r"index [0-9a-f]{40}\.\.[0-9a-f]{40} 100644", index)  # for --3way
    repository = re.search(r"https://github\.com/([\w-]+/[\w-]+)\.", preamble)[1]
    commands = re.findall(r"^  (git .*)$", preamble, re.MULTILINE)
    assert re.fullmatch(rf"git checkout [0-9a-f]{{40}} -- {re.escape(path)}", commands[0])
    assert commands[1:] == [f"git apply --unidiff-zero ../agsm-loss/integrations/patches/{name}"]
    block = next(one.text for one in readme.blocks(GUIDE, "") if name in one.text)
    assert f"# {repository}\n" + "\n".join(commands) + "\n" in block


@every_patch
def test_the_calls_of_a_patch_fit_the_signatures(name):
    trees = [
        ast.parse(textwrap.dedent("\n".join(line[1:] for line in hunk.lines)))
        for hunk in patch(name).hunks
    ]
    names, checked, given = {}, set(), set()
    for node in (one for tree in trees for one in tree.body if isinstance(one, ast.ImportFrom)):
        if node.module.partition(".")[0] == "agsm_loss":
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
            given |= set(keywords)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = OURS.get(function.value.id)
            if owner is None:
                continue  # torch's, or the script's own
            inspect.signature(getattr(owner, function.attr)).bind(None, *places, **keywords)
        else:
            continue
        checked.add(ast.unparse(function))
    if "undo_guidance" in checked:  # the script's loss is AGSM
        return
    assert checked >= {"AGSMLoss", "AGSMRegularizer", "agsm"}
    assert "null" in given  # the empty caption competes


def test_the_guides_example_is_of_a_patch():
    (example,) = readme.blocks(GUIDE, "diff")
    _, *shown = re.split(r"^@@.*\n", example.text, flags=re.MULTILINE)
    held = ["\n".join(hunk.lines) + "\n" for name in FILES for hunk in patch(name).hunks]
    assert shown and all(any(one in hunk for hunk in held) for one in shown)
