"""Models, weights and tokenizers: the teacher is found and checked, and models are built piece by piece on the ranks."""
