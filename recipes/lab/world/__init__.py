"""A small world of coloured shapes with an exact detector.

    spec (what a caption says) -> scene (what an image shows) -> image
    image -> detections -> verdict on the spec's GenEval row

Modules, in that order: `scene`, `captions`, `render`, `prompts`, `detect`, `score`, `export`.
An image is 24x24 RGB: a mid-grey ground and one to four shapes (circle, square, triangle) of
6x6 pixels in four colours, each in its own cell of a 3x3 grid. Only numpy is needed to draw,
scipy to detect, datasets to export.
"""
