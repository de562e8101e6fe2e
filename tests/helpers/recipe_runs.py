"""What a recipe leaves under its output, and a way to kill it in the middle."""

import json

from safetensors.torch import load_file


def trained(folder):
    """Every tensor of tokens/ and lora/ by name."""
    return {
        f"{part}/{name}": value
        for part in ("tokens", "lora")
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def log(folder):
    """The lines of log.jsonl without the time, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def killing(function, call):
    """`function`, but for its call of that number, which interrupts the run."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped
