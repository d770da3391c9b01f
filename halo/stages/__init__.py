"""The stages of HALO, one module each: `run(context)` does the work and completes the stage's folder."""
