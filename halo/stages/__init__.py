"""The stages of HALO: one module for each record in halo/graph.py (`stage_module` says what a module has)."""
