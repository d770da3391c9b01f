"""Sequences that several ranks share, and what long ones leave in memory."""
