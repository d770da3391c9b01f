"""Models, weights and tokenizers: the teacher, the hybrid, and how each is built piece by piece on the ranks."""
