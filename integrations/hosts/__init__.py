"""Training steps of other methods, with AGSM as a term.

A file for each method; `step` holds what they share, `ddpo_parts` what `trl_ddpo` needs without trl.
"""
