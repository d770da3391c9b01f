"""The memory and time that a training stage will need, predicted before it is queued."""
