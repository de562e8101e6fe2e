"""AGSM in trainers that people already use, through the doors that they have.

A file for each trainer. None of them is imported before it is needed, and nothing of theirs is
copied: each drop-in gives the trainer's own loss a moved prediction (`undo_guidance` of
`agsm_loss.functional`), so that its weighting, masks and schedules stay. With a guidance scale of 1
the loss is the trainer's own, bit for bit.
"""

__all__ = ["ai_toolkit", "diffsynth_studio", "sd_scripts"]
