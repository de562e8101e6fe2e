"""The README's code runs, and is what it says it is."""

import re
import subprocess
import sys
from pathlib import Path

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
