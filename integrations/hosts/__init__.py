"""Training steps that AGSM can be part of: a file for each method, `step` for what they share."""
