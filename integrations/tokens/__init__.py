"""Soft tokens in stock diffusers denoisers: attach, save, load, sample; a file for each model."""
