"""Every byte that is read or written: local files, URLs, the Hugging Face Hub and the cache of downloads."""
