"""megagrow grows small pretrained transformers into large ones and trains them for less."""

__version__ = "0.1.0"
