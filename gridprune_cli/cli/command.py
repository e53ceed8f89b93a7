"""What every command has in common: how its help looks, and that its stdout is for data alone."""

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand

from gridprune_cli.cli.output import only_data_on_stdout

OUTPUT = "Output"  # the panel of options that name no other one, `--help` among them


class Command(TyperCommand):
    """A command. `epilog` holds its examples, a command line each, which help prints as they are, to be copied."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if parameter.param_type_name == "option" and not parameter.rich_help_panel:
                parameter.rich_help_panel = OUTPUT
        return parameters

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            _show_default(parameter)
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        self.epilog = examples
        if examples:
            formatter.write(f" Examples:\n\n{examples}")


class ModelCommand(Command):
    """A command that runs models. Its help is printed before it is invoked."""

    def invoke(self, ctx: Any) -> Any:
        with only_data_on_stdout():
            return super().invoke(ctx)


def _show_default(parameter: Any) -> None:
    """Puts an option's default behind its help, where Typer would give it a line of its own.

    Its variable is left to `gridprune env`, which lists all that have one.
    """
    default = parameter.show_default
    if not isinstance(default, str):
        default = parameter.default if default and parameter.default not in (None, False, "") else None
    default = ", ".join(default) if isinstance(default, list) else default
    if default is not None:
        parameter.help += f" [{default}]"
    parameter.show_default = parameter.show_envvar = False


def examples(*lines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command examples for its help."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command.examples = "\n".join(f"   {line}" for line in lines)  # type: ignore[attr-defined]
        return command

    return decorate
