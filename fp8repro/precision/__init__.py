"""A recipe inside a model: layers, master weights, loss scaling, telemetry, CUDA graphs."""
