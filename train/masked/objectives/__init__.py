"""Pretraining objectives: one file each, and this table of their names.

An objective is a subclass of Mage. Adding one takes its file, its line in OBJECTIVES, and its section in
presets/base.yaml under `pretrain`. Only the objective that is trained is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from semdict.pipeline.common.errors import UsageError, suggestion

if TYPE_CHECKING:
    from semdict.train.masked.objectives.mage import Mage

OBJECTIVES: dict[str, tuple[str, str]] = {  # name -> module, class
    "lease": ("semdict.train.masked.objectives.lease", "Lease"),
    "mage": ("semdict.train.masked.objectives.mage", "Mage"),
    "sorcen": ("semdict.train.masked.objectives.sorcen", "Sorcen"),
}


def objective_class(name: str) -> type["Mage"]:
    """The objective of a name, which is also the family of the models it trains; UsageError names the nearest."""
    if name not in OBJECTIVES:
        raise UsageError(f"objective {name!r} is unknown; {suggestion(name, OBJECTIVES)}")
    module, attribute = OBJECTIVES[name]
    return getattr(import_module(module), attribute)
