"""The stages one after another, each going on from what it saved last."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration

from gridprune_cli.vlm.compressor import save_compressor
from gridprune_cli.vlm.pruning_module import PruningModule, save_pruning_module
from training import model as built
from training.compressor import Compression
from training.data import Pool, normalise, progress
from training.language import Language, whiten
from training.localizer import Localizer, shrink
from training.plan import (
    COMPRESSOR,
    LANGUAGE,
    LANGUAGE_AGAIN,
    LANGUAGE_COUNTS,
    LANGUAGE_LAST,
    LOCALIZER,
    LOCALIZER_AGAIN,
    LOCALIZER_TOWER,
    PRUNER,
    PRUNER_AGAIN,
    TOWER,
    TOWER_AGAIN,
    Plan,
)
from training.pruner import Guided, Retained
from training.tower import Tower

SAVE_EVERY = 200  # steps
LOG_EVERY = 50  # steps


class Log:
    """Mean losses every few steps, a JSON line each."""

    def __init__(self, path: Path, stage: str, first: int):
        self.path, self.stage = path, stage
        self.sums: dict[str, float] = {}
        self.began = time.time()
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= first]  # later ones come again
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, step: int, losses: dict[str, Tensor], tokens: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        if (step + 1) % LOG_EVERY == 0:
            means = {name: round(total / LOG_EVERY, 4) for name, total in self.sums.items()}
            line = {"stage": self.stage, "step": step + 1, "tokens": tokens, **means}
            with self.path.open("a") as file:
                file.write(json.dumps(line | {"seconds": round(time.time() - self.began)}) + "\n")
            self.sums.clear()


def optimise(
    name: str,
    model: Tower | Language | Localizer | Compression | Guided,
    pool: Pool,
    plan: Plan,
    work: Path,
    device: torch.device,
    *,
    autocast: bool = True,
) -> None:
    """Runs a stage to its end. Weights and optimiser are saved every `SAVE_EVERY` steps, and loaded where they were.

    autocast  computes in bfloat16 where that loses little; else all in float32
    """
    checkpoint = work / f"{name}.pt"
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), fused=True)
    first, last = plan.start, plan.last
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    log = Log(work / "log.jsonl", name, first)
    with progress() as bar:
        task = bar.add_task(name, total=last - plan.start, completed=first - plan.start)
        for step in range(first, last):
            for group in optimiser.param_groups:
                group["lr"] = plan.rate_at(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                losses = model.losses(pool, step, plan, device)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            log.add(step, losses, plan.tokens_at(step))
            bar.update(task, completed=step + 1 - plan.start)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
                partial = checkpoint.with_suffix(".tmp")
                saved = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
                torch.save(saved, partial)
                partial.replace(checkpoint)


@torch.no_grad()
def encodings(tower: Tower, pool: Pool, device: torch.device, *, autocast: bool = True) -> Iterator[Tensor]:
    """Vision features of a pool, the penultimate layer's patches, 64 scenes at a time: `(64, N, D)` float16."""
    with progress() as bar:
        for at in bar.track(range(0, pool.count, 64), description="encoding scenes"):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                hidden_states, _ = tower.hidden_states(normalise(pool.pixels[at : at + 64], device))
            yield hidden_states[:, 1:].half().cpu()  # without CLS


def store_features(tower: Tower, pool: Pool, path: Path, device: torch.device, *, autocast: bool = True) -> np.ndarray:
    """Vision features of a pool, `(scenes, N, D)` float16, computed once and mapped from disk."""
    if not path.exists():
        partial = path.with_suffix(".tmp")
        config = tower.clip.config.vision_config
        size = (pool.count, (config.image_size // config.patch_size) ** 2, config.hidden_size)
        out = np.lib.format.open_memmap(partial, "w+", np.float16, size)
        at = 0
        for batch in encodings(tower, pool, device, autocast=autocast):
            out[at : at + len(batch)] = batch.numpy()
            at += len(batch)
        out.flush()
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def store_encodings(tower: Tower, pool: Pool, work: Path, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Vision features of a pool, as `store_features` has them, and saliency `(scenes, N)`, CLS's mean attention."""
    paths = [work / f"compressor-{name}.npy" for name in ("features", "saliency")]
    if not paths[1].exists():  # written last
        saliency: list[Tensor] = []
        attention = tower.clip.vision_model.encoder.layers[-2].self_attn
        hook = attention.register_forward_hook(lambda _, __, out: saliency.append(out[1][:, :, 0, 1:].float().mean(1)))
        features = list(encodings(tower, pool, device))
        hook.remove()
        for path, batches in zip(paths, (features, saliency), strict=True):
            partial = path.with_suffix(".tmp.npy")
            np.save(partial, torch.cat(batches).cpu().numpy())
            partial.replace(path)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1])


def train(out: Path, work: Path, seed: int, device: torch.device, checkpoint: str = "model") -> None:
    """Trains a checkpoint into `out`, "model" with its compressor and its pruning module, or "localizer".

    "pruner" trains the pruning module alone, of the checkpoint that is in `out`. All is resumed from `work`.
    """
    work.mkdir(parents=True, exist_ok=True)
    if checkpoint == "pruner":
        train_pruner(out, work, seed, device)
        return
    # 1. vision and text tower
    torch.manual_seed(seed)
    tower = Tower().to(device)
    scenes = Pool(work, TOWER.first_seed, TOWER.scenes)
    optimise("tower", tower, scenes, TOWER, work, device)
    optimise("tower-again", tower, scenes, TOWER_AGAIN, work, device)
    tower.clip.to(torch.bfloat16).to(torch.float32)  # what ships is 16-bit: the language model learns from just that
    # 2. projector and language model, on the frozen tower's stored features
    torch.manual_seed(seed)
    language = Language().to(device)
    language.llava.model.vision_tower.load_state_dict(tower.clip.vision_model.state_dict())
    pool = Pool(work, LANGUAGE.first_seed, LANGUAGE.scenes)
    language.features = store_features(tower, pool, work / "features.npy", device)
    sample = torch.from_numpy(np.array(language.features[:1000])).flatten(0, 1)  # (M, D)
    whiten(language.llava.model.multi_modal_projector, sample)
    optimise("language", language, pool, LANGUAGE, work, device)
    optimise("language-again", language, pool, LANGUAGE_AGAIN, work, device)
    optimise("language-last", language, pool, LANGUAGE_LAST, work, device)
    optimise("language-counts", language, pool, LANGUAGE_COUNTS, work, device)
    if checkpoint == "localizer":
        torch.manual_seed(seed)
        train_localizer(out, work, tower, language, scenes, pool, device)
        return
    # 3. the compressor, before the frozen model as it ships
    language.llava.model.language_model.set_attn_implementation("sdpa")
    built.save(out, language.llava, tower.clip)
    torch.manual_seed(seed)
    pool = Pool(work, COMPRESSOR.first_seed, COMPRESSOR.scenes)
    compression = Compression(language.llava.float(), tower.clip.float()).to(device)
    compression.features, compression.saliency = store_encodings(tower, pool, work, device)
    optimise("compressor", compression, pool, COMPRESSOR, work, device)
    save_compressor(compression.compressor, out)
    # 4. the pruning module, likewise
    train_pruner(out, work, seed, device)


def train_pruner(out: Path, work: Path, seed: int, device: torch.device) -> None:
    """Trains the module of `--method covipal` for the checkpoint in `out`, in float32: it is so small."""
    tower = Tower()
    tower.clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32)
    llava = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).to(device)
    pool = Pool(work, PRUNER.first_seed, PRUNER.scenes)
    features = store_features(tower.to(device), pool, work / "pruner-features.npy", device, autocast=False)
    torch.manual_seed(seed)
    module = PruningModule(llava.config.text_config.hidden_size).to(device)
    for name, kind, plan in (("pruner", Guided, PRUNER), ("pruner-again", Retained, PRUNER_AGAIN)):
        stage = kind(llava, module)
        stage.features = features
        optimise(name, stage, pool, plan, work, device, autocast=False)
    save_pruning_module(module, out)


def train_localizer(
    out: Path, work: Path, tower: Tower, language: Language, scenes: Pool, pool: Pool, device: torch.device
) -> None:
    localizer = Localizer(tower).to(device)
    with torch.no_grad():
        sample = localizer.vision_features(normalise(shrink(scenes.pixels[:256]), device)).flatten(0, 1)  # (M, D)
    whiten(localizer.llava.model.multi_modal_projector, sample)
    optimise("localizer", localizer, scenes, LOCALIZER, work, device)
    optimise("localizer-tower", localizer, pool, LOCALIZER_TOWER, work, device)
    localizer.adopt(language, pool)
    optimise("localizer-again", localizer, pool, LOCALIZER_AGAIN, work, device)
    localizer.llava.set_attn_implementation("sdpa")
    built.save_localizer(out, localizer.llava)
