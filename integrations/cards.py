"""Model cards, by one writer for all that is saved.

>>> import tempfile
>>> from pathlib import Path
>>> from huggingface_hub import ModelCardData
>>> from agsm_loss.integrations.cards import save_card
>>> folder = Path(tempfile.mkdtemp())
>>> save_card(folder, ModelCardData(tags=["agsm"]), "# For {{ line(base) }}", base="my model")
>>> print((folder / "README.md").read_text().strip())
---
tags:
- agsm
---
<BLANKLINE>
# For my model
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def save_card(into: Path, data: ModelCardData, template: str, **values: Any) -> None:
    """README.md in the folder `into`: the hub's metadata, then the template filled in.

    template: Jinja2's. It may call `line`, `cell` and `quoted`, besides the values.
    """
    text = "---\n{{ card_data }}\n---\n\n" + template.strip() + "\n\n"  # Jinja2 drops one
    own: dict[str, Any] = {"line": line, "cell": cell, "quoted": quoted}
    card = ModelCard.from_template(data, template_str=text, **own, **values)
    card.save(into / "README.md")


def line(text: Any) -> str:
    """For prose and its code: no line breaks, no backticks, nothing that UTF-8 does not have."""
    return " ".join(str(text).replace("`", "'").split()).encode(errors="replace").decode()


def cell(text: Any) -> str:
    """The same in a table's cell."""
    return line(text).replace("|", "\\|")


def quoted(text: Any) -> str:
    """As a string of Python."""
    text = str(text)
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)
