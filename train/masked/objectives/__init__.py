"""Pretraining objectives: one file each, and this table of their names.

An objective is a subclass of Mage. Adding one takes its file, its line in OBJECTIVES, and its section in
presets/base.yaml under `pretrain`.
"""

from semdict.pipeline.common.errors import UsageError, suggestion
from semdict.train.masked.objectives.lease import Lease
from semdict.train.masked.objectives.mage import Mage, Masking
from semdict.train.masked.objectives.sorcen import Sorcen

__all__ = ["OBJECTIVES", "Lease", "Mage", "Masking", "Sorcen", "objective_class"]

OBJECTIVES: dict[str, type[Mage]] = {"lease": Lease, "mage": Mage, "sorcen": Sorcen}


def objective_class(name: str) -> type[Mage]:
    """The objective of a name, which is also the family of the models it trains; UsageError names the nearest."""
    if name not in OBJECTIVES:
        raise UsageError(f"objective {name!r} is unknown; {suggestion(name, OBJECTIVES)}")
    return OBJECTIVES[name]
