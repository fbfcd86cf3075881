"""The stages between a source and a store, each a function of a shard's folder."""
