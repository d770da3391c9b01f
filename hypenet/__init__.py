"""HypeNet: RNN-attention hybrid language models as ordinary transformers models, and their making from a teacher.

Importing it lets `AutoModelForCausalLM.from_pretrained` load HypeNet checkpoints without their own code.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_hypenet import HypeNetConfig
from .modeling_hypenet import HypeNetForCausalLM

__all__ = ["HypeNetConfig", "HypeNetForCausalLM"]

AutoConfig.register(HypeNetConfig.model_type, HypeNetConfig)
AutoModelForCausalLM.register(HypeNetConfig, HypeNetForCausalLM)
