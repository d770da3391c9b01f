"""Models, weights and tokenizers: the teacher as others write it, the hybrid, and how each is built on the ranks."""
