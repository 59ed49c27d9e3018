"""The app: ask about a picture, and see where the model looks, in a browser."""
