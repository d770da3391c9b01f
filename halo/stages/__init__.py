"""The stages of HALO, one module each, and what every one of them gets."""
