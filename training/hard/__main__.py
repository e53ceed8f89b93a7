"""The commands: `python -m training.hard train` and `python -m training.hard questions`."""

import argparse
from pathlib import Path

import torch

from training.hard.run import STAGES, train
from training.hard.write import write_questions


def main() -> None:
    parser = argparse.ArgumentParser("training.hard", description="Train the hard checkpoint, or write its questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from random weights")
    command.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    command.add_argument("--work", type=Path, default=Path("hard-work"), help="folder for what is resumed, and the log")
    command.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    command.add_argument("--threads", type=int, default=torch.get_num_threads())
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command = commands.add_parser("questions", help="write held-out scenes and questions, for `gridprune eval`")
    command.add_argument("--out", type=Path, required=True, help="folder for questions.jsonl and the pictures")
    command.add_argument("--count", type=int, default=400, help="of questions")
    args = parser.parse_args()
    if args.command == "questions":
        write_questions(args.out, args.count)
    else:
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
        train(args.out, args.work, args.seed, torch.device(args.device), tuple(args.stages))


if __name__ == "__main__":
    main()
