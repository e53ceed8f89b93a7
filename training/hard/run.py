"""The stages, each going on from what it saved last."""

from pathlib import Path

import numpy as np
import torch

from gridprune_cli.scenes.scene import TRAIN
from training.data import some_patches
from training.hard import model as built
from training.hard.data import HardPool
from training.hard.language import HardLanguage, fit_projector
from training.hard.questions import KINDS
from training.hard.tower import HardTower
from training.plan import Plan
from training.run import optimise, store_features

STAGES = ("tower", "language", "join")
TOWER = Plan(1400, 24, 3_000, TRAIN, 1.5e-3, ((1.0, 112),))
TOWER_AGAIN = Plan(900, 24, 3_000, TRAIN + 3_000, 1.2e-3, ((1.0, 112),), start=1400)
LANGUAGE = Plan(
    2400, 10, 25_000, TRAIN + 8_000, 1e-3, ((0.3, 24), (0.7, 48)), stop=1600, kinds=KINDS, led=((1, 2), (2, 2))
)
JOIN = Plan(2300, 10, 1_200, TRAIN + 40_000, 1e-3, ((0.6, 64), (0.4, 128)), kinds=KINDS, led=((1, 2), (2, 2)))
JOIN_AGAIN = Plan(
    650,
    10,
    1_200,
    TRAIN + 40_000,
    8e-4,
    ((1.0, 128),),
    start=2300,
    kinds=(*KINDS, "count", "count", "shape"),
    led=((1, 2), (2, 2)),
)
FITTED = 500  # scenes that the projector is fitted to


def train(out: Path, work: Path, seed: int, device: torch.device, stages: tuple[str, ...] = STAGES) -> None:
    """Trains the checkpoint into `out`, resumed from `work`. "tower" and "language" need nothing of each other."""
    for stage in STAGES:
        (work / stage).mkdir(parents=True, exist_ok=True)
    if "tower" in stages:
        torch.manual_seed(seed)
        tower = HardTower().to(device)
        for name, plan in (("tower", TOWER), ("tower-again", TOWER_AGAIN)):
            pool = HardPool(work, plan.first_seed, plan.scenes, drawn=True)
            optimise(name, tower, pool, plan, work / "tower", device, autocast=False)
    if "language" in stages:
        torch.manual_seed(seed)
        pool = HardPool(work, LANGUAGE.first_seed, LANGUAGE.scenes, drawn=False)
        optimise("language", HardLanguage().to(device), pool, LANGUAGE, work / "language", device, autocast=False)
    if "join" in stages:
        join(out, work, seed, device)


def join(out: Path, work: Path, seed: int, device: torch.device) -> None:
    """The third stage, from what the first two have saved, whether they came to their ends or not."""
    torch.manual_seed(seed)
    tower, language = HardTower().to(device), HardLanguage().to(device)
    for model, path in ((tower, work / "tower" / "tower-again.pt"), (language, work / "language" / "language.pt")):
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True)["model"])
    tower.clip.to(torch.bfloat16).to(torch.float32)  # what ships is 16-bit: the language model learns from just that
    language.llava.model.vision_tower.load_state_dict(tower.clip.vision_model.state_dict())
    pool = HardPool(work, JOIN.first_seed, JOIN.scenes, drawn=True)
    language.features = store_features(tower, pool, work / "join" / "features.npy", device, autocast=False)
    table = torch.from_numpy(np.array(pool.contents[:FITTED])).long().transpose(1, 2)  # (B, N, 5)
    chosen = some_patches(table[..., 0], 128, torch.Generator().manual_seed(seed))
    index = torch.arange(len(table))[:, None]
    features = torch.from_numpy(np.array(language.features[:FITTED])).float()[index, chosen]
    fit_projector(
        language.llava.model.multi_modal_projector, features.flatten(0, 1), table[index, chosen, 1:].flatten(0, 1)
    )
    optimise("join", language, pool, JOIN, work / "join", device, autocast=False)
    optimise("join-again", language, pool, JOIN_AGAIN, work / "join", device, autocast=False)
    language.llava.model.language_model.set_attn_implementation("sdpa")
    built.save(out, language.llava, tower.clip)
