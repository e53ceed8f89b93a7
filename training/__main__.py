"""The command: `python -m training`."""

import argparse
from pathlib import Path

import torch

from training.run import train


def main() -> None:
    parser = argparse.ArgumentParser("training", description="Train the embedded model from random weights.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoints; with `--checkpoint pruner` it has one"
    )
    parser.add_argument("--checkpoint", choices=("model", "localizer", "pruner"), default="model")
    parser.add_argument(
        "--work", type=Path, default=Path("scenes-work"), help="folder for what is resumed, and the log"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # a CPU slows down several times over as probabilities shrink to denormal numbers
    train(args.out, args.work, args.seed, torch.device(args.device), args.checkpoint)


if __name__ == "__main__":
    main()
