"""The frozen teacher: beside the student or on ranks of its own, and the forms of its logits."""
