"""Images and a question as a command line names them."""

from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli.output import read_stdin
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from gridprune_cli.image_files import Source

Images = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Image files, or - for stdin.", show_default=False)
]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="The question, or - for stdin.", show_default=False)]


def read_inputs(images: list[str], question: str) -> tuple[list["Source"], str]:
    """Images and question, `-` read from stdin. Raises BadInput where more than one of them is to come from there."""
    from gridprune_cli.image_files import read_source

    if [*images, question].count("-") > 1:
        raise BadInput("only one of images and question can come from stdin", place="-")
    text = read_stdin("the question").decode("utf-8", "replace").strip() if question == "-" else question
    return [read_source(image) for image in images], text
