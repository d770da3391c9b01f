"""The stages of HALO, a module for each: `run(context)` does the work and completes the stage's folder."""
