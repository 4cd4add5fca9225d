"""Zero-shot classification, retrieval and few-shot evaluation of embeddings, with their tables."""
