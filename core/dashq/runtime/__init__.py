"""The runtime, which uses a result: packed layers and how transformers opens them."""
