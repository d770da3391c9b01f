"""The frozen teacher, beside the student or on dedicated ranks, and the forms of its logits."""
