"""What a person looks at: HTML pages, curves, TensorBoard, the console, model cards."""
