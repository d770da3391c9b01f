"""What a plan assumes of GPUs, links and DeepSpeed: constants, each with its source. A measurement can correct them."""

GIB = 2**30

# Rates, as shares of the data sheets'.
REACHED = 0.81
"""The share of a GPU's bf16 peak that a large product reaches: 800 of 989 TFLOP/s on an H100 (measured)."""
PRODUCTS = 0.93
"""The share of that which these models' products reach: 92 TFLOP in 120 ms in a step of stage 2 of 1.7B on an H200
(measured), which is 0.96; larger models keep the GPU hotter and its clock lower (assumed)."""
FP8_PRODUCT = 0.6
"""The time of a teacher's product in FP8, as a share of that in bf16: 0.5 to 0.7 of products alone on an H100
(docs/performance.md, measured)."""
FLASH_ATTENTION = 0.58
"""The share of the peak that flash attention reaches: 580 TFLOP/s forward and backward at 16K on an H200 (measured)."""
KERNELS = 0.8
"""The share of the memory's bandwidth that fused kernels reach: 0.95 by stage 2's loss on an H200 (measured)."""
BANDWIDTH = 0.4
"""The same of torch's other operations: 130 GB in 67 ms in that step of stage 2 (measured)."""
LINK = 0.6
"""The share of a node's links: an all-gather receives 270 of 450 GB/s on two H200s (measured)."""
NETWORK = 0.8
"""The share of the network between nodes (assumed)."""
HIDDEN = 0.7
"""The share of the exchange within a step that computation can hide (assumed)."""
DISPATCH = 12e-6
"""Seconds that the host needs to launch an operation that is not recorded: a small model waits for these, not for the
GPU (measured in the pretraining of the embedded teacher on an H200)."""
STEP = 0.010
"""Seconds of a step in which the GPU waits for the host, in small pieces between kernels: in stage 2 of 1.7B on an H100
it worked 177 of 190 ms (measured)."""
RECORDED_STEP = 0.003
"""The same where forward and backward are a CUDA graph: 191 of 194 ms in stage 2 of 135M (measured)."""
ZERO3_LAYER = 0.005
"""The same of each layer under ZeRO-3, whose hooks run on the host: 90 ms of 18 layers of the 9B, 180 of 36 of the 4B
on two GPUs, on H200s (measured, within a tenth of a step)."""
CUT_LAYER = 0.003
"""The same of each layer of a teacher that is cut over ranks: 1.6 ms on two H100s, 4.3 on two H200s (measured)."""
HOST_BANDWIDTH = 20e9
"""Bytes/s that a rank moves if its optimizer is on the host (assumed)."""

# Memory beside the tensors that are counted, in bytes.
CONTEXT = 1.0 * GIB
"""CUDA's context, kernels, cuBLAS's workspaces (assumed)."""
NCCL = 1.0 * GIB
"""NCCL's buffers, if there is more than one rank (assumed)."""
FRAGMENTATION = 0.05
"""What torch's allocator holds beyond the allocated bytes, as a share of them (assumed)."""

# Bytes a parameter.
BF16 = 2
OPTIMIZER_STATE = 12
"""fp32 weight and two fp32 moments."""
STEP_BUFFERS = 6
"""While the optimizer steps: the gradient flattened, and in fp32."""
STEP_MOVED = 30
"""Bytes moved around the step in one kernel, at the rate of kernels: the gradients' norm, and AdamW. 19 and 1.3 ms for
1.93B parameters on an H100 (measured)."""
PLAIN_STEP_MOVED = 56
"""The same of DeepSpeed's step, under ZeRO-3: gradients into buckets and out, their norm, flattening, conversion to
fp32, AdamW, bf16 copies. 40 ms for 1.93B parameters on an H100 (measured)."""
HOST_STEP_MOVED = 34
"""The same on the host: AdamW, and gradient and weight across the bus."""
