"""The edge runtime: scores images with an exported model, without PyTorch, Ray and object stores."""
