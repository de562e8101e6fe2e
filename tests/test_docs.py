"""The API reference builds from the docstrings without a warning."""

import re
import subprocess
import sys

import pytest
from readme import ROOT

pytest.importorskip("pdoc")


@pytest.mark.slow
def test_make_docs_builds_every_public_module(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^docs:.*\n\t.*?(-m pdoc .*)$", makefile, re.MULTILINE)
    command = [str(tmp_path) if one == "build/docs" else one for one in recipe[1].split()]
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    pages = {page.relative_to(tmp_path).with_suffix("").parts for page in tmp_path.rglob("*.html")}
    folder = ROOT / "integrations"
    modules = {one.relative_to(folder).with_suffix("").parts for one in folder.rglob("[!_]*.py")}
    modules.remove(("hosts", "flow_factory"))  # needs Flow-Factory, which is no extra of ours
    assert {("agsm_loss", "integrations", *parts) for parts in modules} <= pages
    page = (tmp_path / "agsm_loss.html").read_text()
    for name in ("AGSMLoss", "AGSMRegularizer", "EMA", "SoftTokens", "Candidates"):
        assert f'id="{name}"' in page
    assert "Arguments:</h6>" in page  # Google's sections are headings, not text
