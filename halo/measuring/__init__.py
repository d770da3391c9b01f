"""Measurements of models (recall, common-sense reasoning, loss), layer importance, and reports."""
