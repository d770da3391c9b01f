"""The types of settings and options, with their bounds: what lies outside is refused where they are read.

pydantic checks them (halo/tables.py), and the presets' schema shows them to editors. A bound is where a value stops
making sense, or where what is made of it would no longer be a number: nobody trains on a billion samples a step.
"""

import re
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]
"""0 stands for none, or for a choice of the code's."""
Samples = Annotated[int, Field(ge=1, le=10**6)]
"""What fits in a step, or is measured in one go."""
SamplesOrNone = Annotated[int, Field(ge=0, le=10**6)]
Tokens = Annotated[int, Field(ge=1, le=2**22)]
"""Of a sequence: 16 times the longest of the paper, and as many as the held-out text that is read."""
Window = Annotated[int, Field(ge=2, le=2**22)]
"""Tokens of held-out text, the last of which is only a target."""
Ranks = Annotated[int, Field(ge=1, le=2**16)]
RanksOrNone = Annotated[int, Field(ge=0, le=2**16)]
Width = Annotated[int, Field(ge=1, le=2**20)]
"""Of a model, or the number of its words or heads."""
Layers = Annotated[int, Field(ge=1, le=2**10)]
LayersOrNone = Annotated[int, Field(ge=0, le=2**10)]
"""Also the number of a layer, from 0."""
LayersOrAuto = Annotated[int, Field(ge=-1, le=2**10)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes."""
Rate = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
"""A learning rate, or a factor of a loss."""
Decay = Annotated[float, Field(ge=0, le=0.999999, allow_inf_nan=False)]
"""Of a moment of AdamW: from the bound on, 1 - decay would be 0 in float32."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Norm = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
RopeBase = Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(ge=1e-12, le=1, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=1.01, le=1e9, allow_inf_nan=False)]
"""A base a of Eq. 11, or a constant in its place. The logarithm to a base near 1 is near infinity."""
Giga = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
"""Gigabytes, or gigabits in a second."""

NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""A control character, or half of one: so Python has what is typed in another encoding than UTF-8."""
_ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_FOLDER = r"^\w[\w .+=@-]*$"
IN_WORDS = {
    _ONE_LINE: "text without control characters",
    _FOLDER: "the name of a folder, of letters, digits, blanks and ._+=@-",
}
"""The patterns, as errors name them."""
Line = Annotated[str, Field(pattern=_ONE_LINE, max_length=4096)]
"""A path with a control character would break the line that names it."""
Word = Annotated[str, Field(pattern=_ONE_LINE, min_length=1, max_length=4096)]
FolderName = Annotated[str, Field(pattern=_FOLDER, max_length=60)]
"""It leads nowhere else."""
SHOWN = 100


def shown(value: str) -> str:
    """The characters of a wrong value that an error repeats: at most SHOWN."""
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
