"""From text to batches of tokens: sources, preparation, shards, streams, held-out text and needles."""
