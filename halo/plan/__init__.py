"""What a training stage will take on a cluster, before it is queued."""
