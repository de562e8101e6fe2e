"""What a README holds: code blocks, commands, links and paragraphs."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RECIPES = [f"recipes/{name}.md" for name in ("README", "running", "evaluation", "troubleshooting")]
RESULTS = [
    f"recipes/lab/results/{name}.md" for name in ("README", "alone", "preferences", "rewards")
]
INTEGRATIONS = [
    f"integrations/{part}.md" for part in ("README", "engines", "hosts/README", "patches/README")
]
NAMES = ("README.md", *INTEGRATIONS, *RECIPES, *RESULTS)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line before its first."""

    language: str
    text: str
    line: int


@cache
def text_of(name):
    return (ROOT / name).read_text()


def blocks(name, language=None):
    """The fenced blocks, in order; of one language where one is given."""
    text = text_of(name)
    found = [
        Block(one[1], one[2], text.count("\n", 0, one.start()) + 1)
        for one in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
    return [one for one in found if language in (None, one.language)]


def prose(name):
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)


def code(name):
    """Every inline code span, on one line, and every line of the blocks that are commands."""
    spans = [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", prose(name))]
    lines = [line for block in blocks(name, "") for line in block.text.splitlines()]
    return spans + [line.split("#")[0].strip() for line in lines if line.strip()]


def paragraphs(name):
    """Line number and lines of each paragraph or list item; tables and headings are neither."""
    text = re.sub(
        r"^```.*?^```$",
        lambda block: "\n" * block[0].count("\n"),
        text_of(name),
        flags=re.DOTALL | re.MULTILINE,
    )
    found, open_ = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith(("|", "#")):
            open_ = False
        elif open_ and not re.match(r"- |\d+\. ", line):
            found[-1][1].append(line)
        else:
            found.append((number, [line]))
            open_ = True
    return found


def tables(name):
    """Line number of each table's first row."""
    lines = text_of(name).splitlines()
    return [i for i, line in enumerate(lines, 1) if line.startswith("|") and not lines[i - 2]]


def anchors(name):
    """The anchors of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def run(name, namespace):
    """Runs the README's Python blocks in order, in one namespace; errors name its lines."""
    for block in blocks(name, "python"):
        source = "\n" * block.line + block.text
        exec(compile(source, str(ROOT / name), "exec"), namespace)  # noqa: S102 (our own text)
