"""What every section of params.yaml is made of: strict sections and bounded numbers.

Types, bounds and rules only; every default stands in presets/base.yaml. Bounds are wide: they refuse slips of the
keyboard (a seed of 10^23, infinite epochs), not unusual experiments.
"""

from collections.abc import Collection
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    create_model,
    model_validator,
)

from semdict.pipeline.common.errors import ParamsError, suggestion

BILLION = 1_000_000_000

Count = Annotated[int, Field(ge=1, le=BILLION)]
CountOrZero = Annotated[int, Field(ge=0, le=BILLION)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1e6)]  # learning rates, temperatures, powers
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
Decibels = Annotated[float, Field(ge=-100.0, le=1000.0)]
Betas = Annotated[list[Share], Field(min_length=2, max_length=2)]
Splits = Annotated[list[str], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Precision = Literal["float32", "bfloat16", "float16"]
SamplingPrecision = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Frozen and without defaults; an unknown key is an error, and so is a number written as text, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


class AddedSection(Section):
    """Keys of an entry of a table in semdict.train that has no class in the schema; the entry checks them itself."""

    model_config = ConfigDict(extra="allow")
    _key: str = PrivateAttr("")  # as in params.yaml: pretrain.NAME

    def checked(self, **types: Any) -> Section:
        """The section with keys of these types: `own.checked(gamma=Weight)`.

        ParamsError for a key that is missing, unknown or of another type.
        """
        model = create_model(type(self).__name__, __base__=Section, **{key: (kind, ...) for key, kind in types.items()})
        try:
            return model.model_validate(self.model_dump())
        except ValidationError as error:
            raise ParamsError("\n".join(self._problem(item, types) for item in error.errors())) from None

    def _problem(self, item: Any, types: dict[str, Any]) -> str:
        key = str(item["loc"][0])
        dotted = f"params.yaml: {self._key}.{key}"
        if item["type"] == "missing":
            return f"{dotted} is missing; `semdict preset --complete` adds what is missing with its default"
        if item["type"] == "extra_forbidden":
            return f"{dotted} is unknown; {suggestion(key, types)}"
        return f"{dotted}: {item['msg']} (the value is {item['input']!r})"


class Extensible(Section):
    """A section with a subsection per entry of a table in semdict.train, which is imported by name.

    Only the table's names are read. Its module is plain data and imports no trainer, so that the pipeline runs without
    their code; tests/test_layout.py checks this.
    """

    table: ClassVar[tuple[str, str]]  # module and name of the table
    needed: ClassVar[bool]  # every entry has a subsection; else an entry without settings has none
    _added: dict[str, AddedSection] = PrivateAttr(default_factory=dict)

    @classmethod
    def entries(cls) -> Collection[str]:
        """Names of the subsections that the table allows, as fields spell them: finetune is fine-tune."""
        module, name = cls.table
        fields = {field.replace("_", ""): field for field in cls.model_fields}
        entries = [entry.replace("-", "_") for entry in getattr(import_module(module), name)]
        return [fields.get(entry.replace("_", ""), entry) for entry in entries]

    def section(self, name: str) -> Section:
        """The subsection of one entry."""
        return self._added[name] if name in self._added else getattr(self, name)

    @model_validator(mode="wrap")
    @classmethod
    def _sections(cls, tree: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Take the subsections without a field out of the mapping; the rest is validated as usual."""
        if not isinstance(tree, dict):
            return handler(tree)
        names = sorted(set(cls.entries()) - set(cls.model_fields))
        section = handler({key: value for key, value in tree.items() if key not in names})
        for name in names:
            if name in tree:
                if not isinstance(tree[name], dict):
                    raise ValueError(f"{name} must be a section (a YAML mapping)")
                section._added[name] = AddedSection.model_validate(tree[name])
                section._added[name]._key = f"{cls.__name__.lower()}.{name}"
            elif cls.needed:
                raise ValueError(f"{name} is missing; `semdict preset --complete` adds what is missing")
        return section


class WarmedUp(Section):
    """A training with keys `epochs` and `warmup_epochs`, which must not be more than all epochs."""

    @model_validator(mode="after")
    def _warms_up_within_the_training(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        return self


class Runtime(Section):
    """How and where things run: no key shapes a result, no stage of dvc.yaml watches it, no fingerprint contains it."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    workers: Annotated[int, Field(ge=0, le=4096)]
    scheduler: Annotated[str, Field(pattern=r"^(auto|in-process|local(-\d+)?|(tcp|tls|ucx)://.+)$")]
    compile: bool
    log_every: Count
    save_every: CountOrZero
    keep: Count
    picture_every: CountOrZero
    pictures: Count
    tensorboard: bool
    wandb: str | None


def check_crop(value: Any) -> Any:
    """ValueError unless it is one of the crop protocols, see `pipeline.images.crops.Crop`."""
    if value in ("resize", "adm"):
        return value
    factor = value.get("resize-larger") if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(factor, (int, float)) and factor is not True and 1 <= factor <= 4:
        return {"resize-larger": float(factor)}
    raise ValueError("must be resize, adm or {resize-larger: F}, F from 1 to 4; pixels.size is the side of the crop")


CropProtocol = Annotated[str | dict[str, float], PlainValidator(check_crop)]
