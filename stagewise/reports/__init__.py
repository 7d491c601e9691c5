"""Output for people: HTML pages, curves, TensorBoard, the console, model cards."""
