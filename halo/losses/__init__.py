"""The fused losses, and the kernel of each."""
