"""The evidence: the embedded world, its base models, the studies and the benches.

It imports the recipes' parts. Of them `data.sources.world` and the reward `detector` load it, by
name; of the commands study.py, score_images.py and edit.py import it.

    python recipes/study.py --config recipes/configs/demo.yaml
    python -m recipes.lab.train_base --config recipes/lab/configs/base_flow.yaml
    python -m recipes.lab.bench.step --models sd15
    python -m recipes.lab.fuzz --seconds 3600 --seed 0
"""

import sys
from pathlib import Path

# `python -m recipes.lab...` starts in the clone's root. The parts are imported from recipes/, as
# they are by `python recipes/train_dpo.py`.
_RECIPES = str(Path(__file__).parents[1])
if _RECIPES not in sys.path:
    sys.path.insert(0, _RECIPES)
