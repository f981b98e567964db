"""Other libraries' caches over a KV store; each is imported when first asked for."""
