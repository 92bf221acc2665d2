"""What every section of params.yaml is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Adam = tuple[float, float]


class Section(BaseModel):
    """Frozen; an unknown key is an error, and so is a number given as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
