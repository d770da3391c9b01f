"""The losses of stages 1 and 2: each with a plain reference and a Triton kernel."""
