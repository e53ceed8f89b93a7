"""The command: `python -m gridprune_cli.scenes.train`."""

import argparse
from pathlib import Path

import torch

from gridprune_cli.scenes.train.run import train


def main() -> None:
    parser = argparse.ArgumentParser("gridprune_cli.scenes.train", description="Train the embedded model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--part", choices=("model", "localizer"), default="model")
    parser.add_argument("--work", type=Path, default=Path("scenes-work"), help="folder for scenes, states and the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # a CPU slows down several times over as probabilities shrink to denormal numbers
    train(args.out, args.work, args.seed, torch.device(args.device), args.part)


if __name__ == "__main__":
    main()
