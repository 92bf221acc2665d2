"""Commands with actions, such as `semdict vcq train`: only the action that is called is imported."""

import argparse
import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Actions:
    """table: action -> (module, what it does); a module offers EXAMPLE, add_arguments(parser), run(args) -> status."""

    command: str
    table: dict[str, tuple[str, str]]

    def listing(self) -> str:
        """The actions for a command's help."""
        width = max(map(len, self.table))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in self.table.items()]
        return "\n".join(["actions:", *lines, "", f"`semdict {self.command} ACTION --help` shows more."])

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The action; its own arguments are read when its module is imported, which is slow for some."""
        parser.usage = f"semdict {self.command} ACTION ..."
        parser.add_argument("action", choices=self.table, metavar="ACTION", help="one of the actions below")
        parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    def run(self, args: argparse.Namespace) -> int:
        """Import the action, read its arguments and hand over."""
        name, text = self.table[args.action]
        module = importlib.import_module(name)
        parser = argparse.ArgumentParser(
            prog=f"semdict {self.command} {args.action}",
            description=text,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        return module.run(parser.parse_args(args.rest)) or 0
