"""What the fields of the sections are made of."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
BiasInit = Literal["zeros", "counts"]
# Of a head's operations: kernels on devices that have them for what is asked, or plain JAX alone.
HeadImplementation = Literal["auto", "xla"]
MeshAxis = Literal["data", "fsdp", "tensor", "sequence"]
MeshAxes = tuple[MeshAxis, ...]
