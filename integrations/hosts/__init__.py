"""Training steps of other methods, with AGSM as a term.

A file for each method; `base` holds what they share, `ddpo_parts` what `trl_ddpo` needs without
trl.
"""
