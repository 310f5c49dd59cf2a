"""The registry: the model_type of a published config.json -> what is known of its family."""

from ..mapping import Family
from . import deepseek

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "kimi_k2": deepseek.V3,
}
