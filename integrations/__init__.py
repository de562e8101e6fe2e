"""Adapters of agsm_loss to its hosts: each module imports the core and one host, never another."""


def how_to_install(extra: str) -> str:
    """The end of an error for an extra that is missing: agsm-loss is on no package index."""
    return f'In a clone of agsm-loss, run: pip install ".[{extra}]"'
