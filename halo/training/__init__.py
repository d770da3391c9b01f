"""The training loop: trainer and objectives, DeepSpeed behind one class, checkpoints, metrics."""
