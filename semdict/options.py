"""Options of a command line: parameters are not options, so an option that names one is answered with `--set`."""

import argparse
import difflib
from collections.abc import Iterator
from typing import Any, NoReturn

# Command -> section of params.yaml whose keys are meant first.
SECTIONS = {
    "semdict vqgan train": "vqgan_train",
    "semdict vcq train": "vcq",
    "semdict vcq encode": "vcq_encode",
    "semdict vcq evaluate": "vcq_evaluate",
    "semdict ar train": "ar",
    "semdict ar sample": "ar_sample",
    "semdict evaluate fid": "scores",
    "semdict evaluate nearest": "scores",
}


class OptionParser(argparse.ArgumentParser):
    """argparse's parser, which says of an unknown option what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Usage and message on stderr, exit status 2."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        word = words.split()[0].partition("=")[0] if unknown else ""
        super().error(f"{message}; {self._hint(word)}" if word.startswith("--") else message)

    def _hint(self, word: str) -> str:
        """The parameters of that name, else the nearest option, else where to look."""
        options = list(self._option_string_actions)
        if "--set" in options and (keys := self._keys(word[2:].replace("-", "_"))):
            others = f" (or {', '.join(keys[1:4])})" if keys[1:] else ""
            return f"it is a parameter: --set {keys[0]}=VALUE{others}"
        near = difflib.get_close_matches(word, options, n=1)
        return f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"

    def _keys(self, name: str) -> list[str]:
        """Keys of params.yaml of this name or with it as their last word, those of the command's section first."""
        section = SECTIONS.get(self.prog, self.prog.removeprefix("semdict ").replace(" ", ".").replace("-", "_"))
        last = [key for key in parameter_keys() if f"_{key.rpartition('.')[2]}".endswith(f"_{name}")]
        own = [key for key in last if key.startswith(f"{section}.")]
        exact = [key for key in last if key.rpartition(".")[2] == name]
        return list(dict.fromkeys([*(key for key in own if key in exact), *own, *exact, *last]))


def parameter_keys() -> Iterator[str]:
    """Every key of params.yaml that holds a value, dotted."""
    from pydantic import BaseModel

    from semdict.pipeline.config.schema import Params

    def keys(model: Any, above: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            dotted = f"{above}{field.alias or name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from keys(field.annotation, f"{dotted}.")
            else:
                yield dotted

    return keys(Params, "")
