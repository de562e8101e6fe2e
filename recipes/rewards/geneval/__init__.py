"""GenEval's rules (arXiv 2310.11513) on transformers' detectors, in place of mmdet's.

GenEval's own `evaluate_images.py` finds objects with mmdet's Mask2Former and names colours with
open_clip. Here both are models of transformers. The rules are the same, so a verdict differs where
a detection does: these scores are not GenEval's, and tables should name the detector.

    from rewards.geneval.evaluator import Evaluator

    evaluator = Evaluator("facebook/mask2former-swin-small-coco-instance")
    for judgement, kept in evaluator(images, rows): ...

rules.py      prompts -> rows; detections -> verdict, reason and credit
detectors.py  image -> detections: instance segmentation, or boxes of an open vocabulary
colours.py    an object's colour, by CLIP
evaluator.py  the three together, and as a reward
"""
