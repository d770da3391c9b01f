"""From text to batches of tokens: sources, shards and streams, held-out text, needle tests."""
