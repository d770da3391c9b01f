"""HypeNet: RNN-attention hybrid language models as ordinary transformers models, and their making from a teacher.

Importing it lets `AutoModelForCausalLM.from_pretrained` load HypeNet checkpoints without their own code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import HypeNetCache
from .configuration_hypenet import HypeNetConfig
from .export import export_pretrained
from .modeling_hypenet import HypeNetForCausalLM, HypeNetModel
from .transfer import hybrid_config, hybrid_from_teacher

__all__ = [
    "HypeNetCache",
    "HypeNetConfig",
    "HypeNetForCausalLM",
    "HypeNetModel",
    "export_pretrained",
    "hybrid_config",
    "hybrid_from_teacher",
]

AutoConfig.register(HypeNetConfig.model_type, HypeNetConfig)
AutoModel.register(HypeNetConfig, HypeNetModel)
AutoModelForCausalLM.register(HypeNetConfig, HypeNetForCausalLM)
