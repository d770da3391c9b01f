"""What the server imports that forks the ranks: once, for all of them."""

import gc

# DeepSpeed imports these only where it makes an optimizer, the second of them with all of torch's compiler.
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import tests.distributed.fault_jobs  # noqa: F401
from halo.graph import STAGES
from halo.pipeline import stage_module

for stage in STAGES:
    stage_module(stage)
gc.freeze()  # the ranks need not search all this for garbage
