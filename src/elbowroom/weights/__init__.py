"""Weight formats and the providers that serve them to the decoder."""
