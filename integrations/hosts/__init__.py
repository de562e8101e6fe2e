"""Training steps of other methods, with AGSM as a term.

A file for each method; `base` holds what they share, `rollouts` and `dynamics` how those with a
reward sample, `ddpo_parts` and `flow_factory_parts` what `trl_ddpo` and `flow_factory` need without
trl and Flow-Factory.
"""

# The modules that `make docs` describes. Left out is `flow_factory`: Flow-Factory is no extra.
__all__ = [
    "base",
    "ddpo_parts",
    "diffusion_dpo",
    "diffusion_nft",
    "dynamics",
    "flow_factory_parts",
    "flow_grpo",
    "inpo",
    "rollouts",
    "spo",
    "trl_ddpo",
]
