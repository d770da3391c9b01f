"""The stages of HALO, one module each, named as its record in halo/graph.py. halo/pipeline.py says what a module has."""
