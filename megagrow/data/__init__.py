"""From text to batches: tokenizers, `.bin/.idx` files, packed samples, a resumable order."""
